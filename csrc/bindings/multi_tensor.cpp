// The operations of multi_tensor, on lists of tensors as tables of addresses, on the CPU and on CUDA.
#include "bindings/bindings.h"

#include <vector>

#include "cpu/multi_tensor.h"
#ifdef DINO_FAST_HAS_CUDA
#include "cuda/multi_tensor.h"
#endif

namespace dino_fast::bindings {
namespace {

// The elements of one row, and of all rows so far.
void count_elements(const Validator& check, int64_t numel, int64_t& total) {
  check.range("a row's number of elements", numel, 0);
  if (__builtin_add_overflow(total, numel, &total)) check.refuse("the rows have more than 2^63 elements");
}

void multi_tensor_ema_update(int64_t n, const py::buffer& table, double momentum, int threads) {
  Validator check("multi_tensor_ema_update");
  check.threads(threads);
  const py::buffer_info info = table.request();
  const int64_t* c = columns<int64_t>(check, info, n, 6);
  std::vector<EmaRow> rows(n);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t numel = c[i], teacher = c[n + i], student = c[2 * n + i], copy = c[3 * n + i];
    count_elements(check, numel, total);
    const int64_t bytes = check.dtype("the teacher", c[4 * n + i]);
    const int64_t student_bytes = check.dtype("the student", c[5 * n + i]);
    check.writes("the teacher", teacher, numel, bytes, i);
    if (student != teacher || bytes != student_bytes) check.reads("the student", student, numel, student_bytes, i);
    if (copy != 0) check.writes("the copy", copy, numel, 2, i);
    rows[i] = {c[i], address<void>(c[n + i]), address<void>(c[2 * n + i]), address<void>(c[3 * n + i]),
               static_cast<Dtype>(c[4 * n + i]), static_cast<Dtype>(c[5 * n + i])};
  }
  check.no_overlaps();
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(ema_update)(rows.data(), n, momentum, threads);
}

void multi_tensor_grad_norms(int64_t n, const py::buffer& table, int64_t norms, int threads) {
  Validator check("multi_tensor_grad_norms");
  check.threads(threads);
  const py::buffer_info info = table.request();
  const int64_t* c = columns<int64_t>(check, info, n, 3);
  check.writes("norms", norms, n);
  std::vector<NormRow> rows(n);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    count_elements(check, c[i], total);
    check.reads("the gradient", c[n + i], c[i], check.dtype("the gradient", c[2 * n + i]), i);
    rows[i] = {c[i], address<void>(c[n + i]), static_cast<Dtype>(c[2 * n + i])};
  }
  check.no_overlaps();
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(grad_norms)(rows.data(), n, address<float>(norms), threads);
}

// multipliers: the address of n floats, or 0 for ones.
void multi_tensor_adamw_ema(int64_t n, const py::buffer& table, const py::buffer& rates, int64_t multipliers,
                            double beta1, double beta2, double eps, double momentum, bool skip, int threads) {
  Validator check("multi_tensor_adamw_ema");
  check.threads(threads);
  const py::buffer_info info = table.request(), rates_info = rates.request();
  const int64_t* c = columns<int64_t>(check, info, n, 10);
  const double* rate = columns<double>(check, rates_info, n, 2);
  const float* multiplier = address<float>(multipliers);
  if (multipliers != 0) check.reads("multipliers", multipliers, n);
  std::vector<AdamWRow> rows(n);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t numel = c[i], param = c[n + i], teacher = c[5 * n + i];
    count_elements(check, numel, total);
    check.writes("the parameter", param, numel, 4, i);
    check.reads("the gradient", c[2 * n + i], numel, check.dtype("the gradient", c[9 * n + i]), i);
    check.writes("exp_avg", c[3 * n + i], numel, 4, i);
    check.writes("exp_avg_sq", c[4 * n + i], numel, 4, i);
    if (teacher != 0 && teacher != param) check.writes("the teacher", teacher, numel, 4, i);
    if (c[6 * n + i] != 0) check.writes("the parameter's copy", c[6 * n + i], numel, 2, i);
    if (teacher != 0 && c[7 * n + i] != 0) check.writes("the teacher's copy", c[7 * n + i], numel, 2, i);
    check.writes("the step", c[8 * n + i], 1, 4, i);
    rows[i] = {c[i],
               address<float>(c[n + i]),
               address<void>(c[2 * n + i]),
               address<float>(c[3 * n + i]),
               address<float>(c[4 * n + i]),
               address<float>(c[5 * n + i]),
               address<void>(c[6 * n + i]),
               address<void>(c[7 * n + i]),
               address<float>(c[8 * n + i]),
               static_cast<Dtype>(c[9 * n + i]),
               rate[i],
               rate[n + i],
               1.0f};
  }
  check.no_overlaps();
  for (int64_t i = 0; multiplier && i < n; ++i) rows[i].multiplier = multiplier[i];
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(adamw_ema)(rows.data(), n, {beta1, beta2, eps, momentum, skip}, threads);
}

#ifdef DINO_FAST_HAS_CUDA
// Plans are given as (address, tensors, chunks); the stream is torch.cuda.current_stream().cuda_stream.
cuda::Plan as_plan(const char* operation, uint64_t base, uint32_t tensors, uint32_t chunks) {
  Validator check(operation);
  check.range("tensors", tensors, 1);
  if (base == 0) check.refuse("the plan's address is null");
  if (base % 16 != 0) check.refuse("the plan's address must be a multiple of 16; got " + std::to_string(base));
  return {base, tensors, chunks};
}
#endif

}  // namespace

void bind_multi_tensor(py::module_& m) {
  m.def("multi_tensor_ema_update", &multi_tensor_ema_update);
  m.def("multi_tensor_grad_norms", &multi_tensor_grad_norms);
  m.def("multi_tensor_adamw_ema", &multi_tensor_adamw_ema);
#ifdef DINO_FAST_HAS_CUDA
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("cuda_multi_tensor_chunk") = cuda::chunk_elements();
  m.def("cuda_multi_tensor_offsets", [](uint32_t tensors, uint32_t chunks) {
    Validator("cuda_multi_tensor_offsets").range("tensors", tensors, 1);
    const cuda::Offsets at = cuda::offsets_of(tensors, chunks);
    return py::make_tuple(at.hyper, at.gradients, at.entries, at.bytes);
  });
  m.def("cuda_upload", [](uint64_t address, const py::bytes& bytes, uint64_t stream) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
    const Validator check("cuda_upload");
    if (address == 0) check.refuse("the address is null");
    if (address % 8 != 0 || size % 8 != 0) {
      check.refuse("whole words of 8 bytes are copied; got " + std::to_string(size) + " bytes to address " +
                   std::to_string(address));
    }
    py::gil_scoped_release unlocked;
    cuda::upload(address, data, size, stream);
  });
  m.def(
      "cuda_multi_tensor_fill_chunks",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t stream) {
        cuda::fill_chunks(as_plan("cuda_multi_tensor_fill_chunks", base, tensors, chunks), stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_norms",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t to, uint64_t stream) {
        if (to == 0) Validator("cuda_multi_tensor_norms").refuse("the norms' address is null");
        cuda::norms(as_plan("cuda_multi_tensor_norms", base, tensors, chunks), to, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_adamw_ema",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t multipliers, uint64_t found_inf, uint64_t stream) {
        cuda::adamw_ema(as_plan("cuda_multi_tensor_adamw_ema", base, tensors, chunks), multipliers,
                                   found_inf, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_ema_update",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t found_inf, uint64_t stream) {
        cuda::ema_update(as_plan("cuda_multi_tensor_ema_update", base, tensors, chunks), found_inf, stream);
      },
      Unlocked());
#endif
}

}  // namespace dino_fast::bindings
