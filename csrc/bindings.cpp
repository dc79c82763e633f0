// The only file that knows Python. Each function takes raw addresses (tensor.data_ptr()), shapes and strides, and
// releases the interpreter lock while it works. Checks of shapes, dtypes and devices are the callers', in dino_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/dino_loss.h"
#include "cpu/instruction_set.h"
#include "cpu/linear_dino_loss.h"
#include "cpu/matmul.h"
#include "cpu/multi_crop.h"
#include "cpu/multi_tensor.h"
#include "cpu/packed_attention.h"
#ifdef DINO_FAST_HAS_CUDA
#include "cuda/multi_crop.h"
#include "cuda/multi_tensor.h"
#endif

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

// A crop is 18 columns of whole numbers: address, height, width of the image; top, left, height, width of the box; height,
// width, address of the result; flip, grey, blur, solarize; order [4]. And 5 of float: factors [4], radius. Rows first.
std::vector<dino_fast::CropTask> crop_tasks(int64_t n, const py::buffer& table, const py::buffer& numbers) {
  const py::buffer_info info = table.request(), numbers_info = numbers.request();
  const int64_t* c = columns<int64_t>(info, n, 18);
  const float* f = columns<float>(numbers_info, n, 5);
  std::vector<dino_fast::CropTask> tasks(n);
  for (int64_t i = 0; i < n; ++i, c += 18, f += 5) {
    dino_fast::CropTask& t = tasks[i];
    t = {address<uint8_t>(c[0]), c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], address<void>(c[9]), {}, {}, f[4],
         c[10] != 0, c[11] != 0, c[12] != 0, c[13] != 0};
    for (int k = 0; k < 4; ++k) t.order[k] = static_cast<int>(c[14 + k]);
    for (int k = 0; k < 4; ++k) t.factors[k] = f[k];
  }
  return tasks;
}

#ifdef DINO_FAST_HAS_CUDA
// Plans are given as (address, tensors, chunks); the stream is torch.cuda.current_stream().cuda_stream.
void bind_cuda(py::module_& m) {
  using dino_fast::cuda::Plan;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("cuda_multi_tensor_chunk") = dino_fast::cuda::chunk_elements();
  m.def("cuda_multi_tensor_offsets", [](uint32_t tensors, uint32_t chunks) {
    const dino_fast::cuda::Offsets at = dino_fast::cuda::offsets_of(tensors, chunks);
    return py::make_tuple(at.hyper, at.gradients, at.entries, at.bytes);
  });
  m.def("cuda_upload", [](uint64_t address, const py::bytes& bytes, uint64_t stream) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
    py::gil_scoped_release unlocked;
    dino_fast::cuda::upload(address, data, size, stream);
  });
  m.def(
      "cuda_multi_tensor_fill_chunks",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t stream) {
        dino_fast::cuda::fill_chunks(Plan{base, tensors, chunks}, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_norms",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t to, uint64_t stream) {
        dino_fast::cuda::norms(Plan{base, tensors, chunks}, to, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_adamw_ema",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t multipliers, uint64_t found_inf, uint64_t stream) {
        dino_fast::cuda::adamw_ema(Plan{base, tensors, chunks}, multipliers, found_inf, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_ema_update",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t found_inf, uint64_t stream) {
        dino_fast::cuda::ema_update(Plan{base, tensors, chunks}, found_inf, stream);
      },
      Unlocked());

  // The table is written to memory of `table_bytes` and copied to the start of `memory_bytes` on the device.
  using dino_fast::cuda::CropTable;
  py::class_<CropTable>(m, "CudaMultiCropTable")
      .def_property_readonly("table_bytes", [](const CropTable& table) { return table.bytes.size(); })
      .def_readonly("memory_bytes", &CropTable::memory)
      .def("write", [](const CropTable& table, int64_t to) {
        std::memcpy(address<void>(to), table.bytes.data(), table.bytes.size());
      });
  m.def("cuda_multi_crop_table", [](int64_t n, const py::buffer& table, const py::buffer& numbers, int channels,
                                    bool bfloat16, bool may_go_down_first, int64_t mean, int64_t std) {
    const std::vector<dino_fast::CropTask> tasks = crop_tasks(n, table, numbers);
    const dino_fast::CropOutput output{channels, bfloat16, may_go_down_first, address<float>(mean), address<float>(std)};
    py::gil_scoped_release unlocked;
    return dino_fast::cuda::plan_crops(tasks.data(), n, output);
  });
  m.def(
      "cuda_multi_crop",
      [](const CropTable& table, uint64_t base, uint64_t stream) {
        dino_fast::cuda::CropPlan plan = table.plan;
        plan.base = base;
        dino_fast::cuda::multi_crop(plan, stream);
      },
      Unlocked());
}
#endif

using LogitsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, LogitType, crop stride, image stride

dino_fast::Logits as_logits(const LogitsTuple& t) {
  return {reinterpret_cast<const void*>(std::get<0>(t)), static_cast<dino_fast::LogitType>(std::get<1>(t)), std::get<2>(t),
          std::get<3>(t)};
}

dino_fast::DinoLossProblem as_problem(const LogitsTuple& student, const LogitsTuple& teacher, uintptr_t center,
                                      const std::vector<float>& pair_weights, std::tuple<int64_t, int64_t, int64_t> shape,
                                      std::tuple<double, double> temps, int threads) {
  return {as_logits(student), as_logits(teacher), reinterpret_cast<const float*>(center), pair_weights.data(),
          std::get<0>(shape), std::get<1>(shape), std::get<2>(shape), std::get<0>(temps), std::get<1>(temps), threads};
}

// shape is (V, B, K), temps (student, teacher), pair_weights 2 x V. Results as in cpu/dino_loss.h; gradient 0: not wanted.
void dino_loss_forward(const LogitsTuple& student, const LogitsTuple& teacher, uintptr_t center,
                       const std::vector<float>& pair_weights, std::tuple<int64_t, int64_t, int64_t> shape,
                       std::tuple<double, double> temps, int threads, uintptr_t loss, uintptr_t teacher_mean,
                       uintptr_t teacher_entropy, uintptr_t row_statistics, uintptr_t gradient) {
  const auto problem = as_problem(student, teacher, center, pair_weights, shape, temps, threads);
  const dino_fast::DinoLossResult result{reinterpret_cast<float*>(loss), reinterpret_cast<float*>(teacher_mean),
                                         reinterpret_cast<float*>(teacher_entropy),
                                         reinterpret_cast<float*>(row_statistics), reinterpret_cast<void*>(gradient)};
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(dino_loss_forward)(problem, result);
}

void dino_loss_gradient(const LogitsTuple& student, const LogitsTuple& teacher, uintptr_t center,
                        const std::vector<float>& pair_weights, std::tuple<int64_t, int64_t, int64_t> shape,
                        std::tuple<double, double> temps, int threads, uintptr_t row_statistics, double upstream,
                        uintptr_t gradient) {
  const auto problem = as_problem(student, teacher, center, pair_weights, shape, temps, threads);
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(dino_loss_gradient)(problem, reinterpret_cast<const float*>(row_statistics), upstream,
                                         reinterpret_cast<void*>(gradient));
}

// The tile is (logits, center, T, V, images, columns, 1 / teacher's temperature, 1 / student's), as in
// cpu/linear_dino_loss.h.
using TileTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double>;

dino_fast::LogitTile as_tile(const TileTuple& t) {
  return {address<float>(std::get<0>(t)), address<float>(std::get<1>(t)), std::get<2>(t), std::get<3>(t),
          std::get<4>(t), std::get<5>(t), std::get<6>(t), std::get<7>(t)};
}

void linear_dino_loss_attend(const TileTuple& tile, int64_t maxima, int64_t sums, int64_t pairs, int64_t read,
                             int64_t readers, int64_t width, int threads) {
  py::gil_scoped_release release;
  const dino_fast::RowState state{address<float>(maxima), address<double>(sums), address<double>(pairs),
                                  address<float>(read), readers, width};
  DINO_FAST_DISPATCH(linear_dino_loss_attend)(as_tile(tile), state, threads);
}

void linear_dino_loss_weigh(const TileTuple& tile, int64_t maxima, int64_t factors, int64_t pair_factors, int threads) {
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_weigh)
  (as_tile(tile), address<float>(maxima), address<float>(factors), address<float>(pair_factors), threads);
}

void linear_dino_loss_normalize(int64_t weight, int64_t gain, int64_t effective, int64_t n, int64_t width, int threads) {
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_normalize)
  (address<float>(weight), address<float>(gain), address<float>(effective), n, width, threads);
}

void linear_dino_loss_project(int64_t gradient, int64_t weight, int64_t gain, int64_t gain_gradient, int64_t n,
                              int64_t width, int threads) {
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_project)
  (address<float>(gradient), address<float>(weight), address<float>(gain), address<float>(gain_gradient), n, width,
   threads);
}

// Address, rows, columns, strides of rows and of columns.
using MatrixTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

dino_fast::Matrix matrix(const MatrixTuple& x) {
  return {address<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x), std::get<4>(x)};
}

void matmul(const MatrixTuple& a, const MatrixTuple& b, int64_t bias, bool add, int64_t out, int64_t out_row, int threads) {
  py::gil_scoped_release unlocked;
  dino_fast::matmul(matrix(a), matrix(b), address<const float>(bias), add, address<float>(out), out_row, threads);
}

// (qkv, strides of token, part and head, ends, sequences, tokens, heads, width, dtype)
using SequencesTuple =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
dino_fast::Sequences as_sequences(const SequencesTuple& t) {
  return {address<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t),
          address<int32_t>(std::get<4>(t)), std::get<5>(t), std::get<6>(t), std::get<7>(t), std::get<8>(t),
          static_cast<dino_fast::Float>(std::get<9>(t))};
}

void packed_attention_forward(const SequencesTuple& sequences, int64_t out, int64_t logsumexp, int threads) {
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(packed_attention_forward)
  (as_sequences(sequences), address<void>(out), address<float>(logsumexp), threads);
}

void packed_attention_backward(const SequencesTuple& sequences, int64_t of_output, int64_t gradient, int threads) {
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(packed_attention_backward)
  (as_sequences(sequences), address<void>(of_output), address<void>(gradient), threads);
}

void multi_crop(int64_t n, const py::buffer& table, const py::buffer& numbers, int channels, bool bfloat16,
                bool may_go_down_first, int64_t mean, int64_t std, int threads) {
  const std::vector<dino_fast::CropTask> tasks = crop_tasks(n, table, numbers);
  const dino_fast::CropOutput output{channels, bfloat16, may_go_down_first, address<float>(mean), address<float>(std)};
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(multi_crop)(tasks.data(), n, output, threads);
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
  m.def("dino_loss_forward", &dino_loss_forward);
  m.def("dino_loss_gradient", &dino_loss_gradient);
  m.def("multi_crop", &multi_crop);
  m.def("matmul", &matmul);
  m.def("matmul_missing", &dino_fast::matmul_missing);
  m.def("packed_attention_forward", &packed_attention_forward);
  m.def("packed_attention_backward", &packed_attention_backward);
  m.def("multi_crop_planes", [](int64_t from, int64_t to, int64_t pixels) {
    py::gil_scoped_release unlocked;
    DINO_FAST_DISPATCH(multi_crop_planes)(address<uint8_t>(from), address<uint8_t>(to), pixels);
  });
  m.def("linear_dino_loss_attend", &linear_dino_loss_attend);
  m.def("linear_dino_loss_weigh", &linear_dino_loss_weigh);
  m.def("linear_dino_loss_normalize", &linear_dino_loss_normalize);
  m.def("linear_dino_loss_project", &linear_dino_loss_project);
#ifdef DINO_FAST_HAS_CUDA
  bind_cuda(m);
#endif
#ifdef DINO_FAST_CUDA_VERSION
  m.attr("cuda_version") = DINO_FAST_CUDA_VERSION;
#else
  m.attr("cuda_version") = py::none();
#endif
}
