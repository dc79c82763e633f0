// The only file that knows Python. Each function takes raw addresses (tensor.data_ptr()), shapes and strides, and
// releases the interpreter lock while it works. Checks of shapes, dtypes and devices are the callers', in dino_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "cpu/multi_tensor.h"

namespace py = pybind11;

namespace {

// glibc hands large blocks back to the kernel when they are freed, and every page of the next one must be touched anew,
// which can cost more than the arithmetic on it. With these thresholds the process keeps what it has freed.
bool keep_freed_memory() {
#ifdef __GLIBC__
  return mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 && mallopt(M_TRIM_THRESHOLD, INT32_MAX) == 1 &&
         mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
  return false;
#endif
}

// multi_tensor takes its lists as tables: a contiguous buffer of int64 or double, one column of n entries after another.
template <typename T>
const T* columns(const py::buffer_info& table, int64_t n, int64_t count) {
  if (table.itemsize != sizeof(T) || table.size != n * count) {
    throw std::invalid_argument("a table of " + std::to_string(count) + " columns of " + std::to_string(n) +
                                " entries is needed; got " + std::to_string(table.size));
  }
  return static_cast<const T*>(table.ptr);
}

template <typename T> T* address(int64_t value) { return reinterpret_cast<T*>(static_cast<intptr_t>(value)); }

void multi_tensor_ema_update(int64_t n, const py::buffer& table, double momentum, int threads) {
  const py::buffer_info info = table.request();
  const int64_t* c = columns<int64_t>(info, n, 6);
  std::vector<dino_fast::EmaRow> rows(n);
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = {c[i], address<void>(c[n + i]), address<void>(c[2 * n + i]), address<void>(c[3 * n + i]),
               static_cast<dino_fast::Dtype>(c[4 * n + i]), static_cast<dino_fast::Dtype>(c[5 * n + i])};
  }
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(ema_update)(rows.data(), n, momentum, threads);
}

void multi_tensor_grad_norms(int64_t n, const py::buffer& table, int64_t norms, int threads) {
  const py::buffer_info info = table.request();
  const int64_t* c = columns<int64_t>(info, n, 3);
  std::vector<dino_fast::NormRow> rows(n);
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = {c[i], address<void>(c[n + i]), static_cast<dino_fast::Dtype>(c[2 * n + i])};
  }
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(grad_norms)(rows.data(), n, address<float>(norms), threads);
}

// multipliers: the address of n floats, or 0 for ones.
void multi_tensor_adamw_ema(int64_t n, const py::buffer& table, const py::buffer& rates, int64_t multipliers,
                            double beta1, double beta2, double eps, double momentum, bool skip, int threads) {
  const py::buffer_info info = table.request(), rates_info = rates.request();
  const int64_t* c = columns<int64_t>(info, n, 10);
  const double* rate = columns<double>(rates_info, n, 2);
  const float* multiplier = address<float>(multipliers);
  std::vector<dino_fast::AdamWRow> rows(n);
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = {c[i],
               address<float>(c[n + i]),
               address<void>(c[2 * n + i]),
               address<float>(c[3 * n + i]),
               address<float>(c[4 * n + i]),
               address<float>(c[5 * n + i]),
               address<void>(c[6 * n + i]),
               address<void>(c[7 * n + i]),
               address<float>(c[8 * n + i]),
               static_cast<dino_fast::Dtype>(c[9 * n + i]),
               rate[i],
               rate[n + i],
               multiplier ? multiplier[i] : 1.0f};
  }
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(adamw_ema)(rows.data(), n, {beta1, beta2, eps, momentum, skip}, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", &dino_fast::isa_name);
  m.def("supported_isas", &dino_fast::supported_isas);
  m.def("set_isa", &dino_fast::set_isa);
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("multi_tensor_ema_update", &multi_tensor_ema_update);
  m.def("multi_tensor_grad_norms", &multi_tensor_grad_norms);
  m.def("multi_tensor_adamw_ema", &multi_tensor_adamw_ema);
#ifdef DINO_FAST_CUDA_VERSION
  m.attr("cuda_version") = DINO_FAST_CUDA_VERSION;
#else
  m.attr("cuda_version") = py::none();
#endif
}
