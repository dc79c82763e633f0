// The only file that knows Python. Each function takes raw addresses (tensor.data_ptr()), shapes and strides, checks
// them (cpu/validate.h), and releases the interpreter lock while it works. dino_fast/ops checks before that what only
// tensors know: how long they are, their dtypes and devices. tests/test_native.py has a case for each function.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cmath>
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
#include "cpu/validate.h"
#ifdef DINO_FAST_HAS_CUDA
#include "cuda/multi_crop.h"
#include "cuda/multi_tensor.h"
#endif

namespace py = pybind11;

namespace {

using dino_fast::Validator;

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
const T* columns(const Validator& check, const py::buffer_info& table, int64_t n, int64_t count) {
  check.range("the number of rows", n, 0);
  int64_t step = table.itemsize;
  bool contiguous = true;
  for (py::ssize_t d = table.ndim - 1; d >= 0; step *= table.shape[d--]) {
    contiguous = contiguous && (table.shape[d] <= 1 || table.strides[d] == step);
  }
  if (!table.item_type_is_equivalent_to<T>() || !(contiguous || table.size == 0)) {
    check.refuse("tables must be contiguous, of whole numbers of 64 bits or floats of " +
                 std::to_string(8 * sizeof(T)) + "; got format '" + table.format + "'");
  }
  if (table.size != check.product("the table", {n, count})) {
    check.refuse("a table of " + std::to_string(count) + " columns of " + std::to_string(n) +
                 " entries is needed; got " + std::to_string(table.size) + " entries");
  }
  return static_cast<const T*>(table.ptr);
}

template <typename T> T* address(int64_t value) { return reinterpret_cast<T*>(static_cast<intptr_t>(value)); }

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
  std::vector<dino_fast::EmaRow> rows(n);
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
               static_cast<dino_fast::Dtype>(c[4 * n + i]), static_cast<dino_fast::Dtype>(c[5 * n + i])};
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
  std::vector<dino_fast::NormRow> rows(n);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    count_elements(check, c[i], total);
    check.reads("the gradient", c[n + i], c[i], check.dtype("the gradient", c[2 * n + i]), i);
    rows[i] = {c[i], address<void>(c[n + i]), static_cast<dino_fast::Dtype>(c[2 * n + i])};
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
  std::vector<dino_fast::AdamWRow> rows(n);
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
               static_cast<dino_fast::Dtype>(c[9 * n + i]),
               rate[i],
               rate[n + i],
               1.0f};
  }
  check.no_overlaps();
  for (int64_t i = 0; multiplier && i < n; ++i) rows[i].multiplier = multiplier[i];
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(adamw_ema)(rows.data(), n, {beta1, beta2, eps, momentum, skip}, threads);
}

// A crop is 18 columns of whole numbers: address, height, width of the image; top, left, height, width of the box; height,
// width, address of the result; flip, grey, blur, solarize; order [4]. And 5 of float: factors [4], radius. Rows first.
std::vector<dino_fast::CropTask> crop_tasks(Validator& check, int64_t n, const py::buffer& table,
                                            const py::buffer& numbers, const dino_fast::CropOutput& output) {
  constexpr int64_t kMostPixels = INT32_MAX;  // on a side
  const py::buffer_info info = table.request(), numbers_info = numbers.request();
  const int64_t* c = columns<int64_t>(check, info, n, 18);
  const float* f = columns<float>(check, numbers_info, n, 5);
  check.range("channels", output.channels, 1, 16);
  check.reads("mean", reinterpret_cast<intptr_t>(output.mean), output.channels);
  check.reads("std", reinterpret_cast<intptr_t>(output.std), output.channels);
  std::vector<dino_fast::CropTask> tasks(n);
  for (int64_t i = 0; i < n; ++i, c += 18, f += 5) {
    dino_fast::CropTask& t = tasks[i];
    t = {address<uint8_t>(c[0]), c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], address<void>(c[9]), {}, {}, f[4],
         c[10] != 0, c[11] != 0, c[12] != 0, c[13] != 0};
    check.range("an image's height", t.height, 1, kMostPixels);
    check.range("an image's width", t.width, 1, kMostPixels);
    check.range("a box's height", t.box_height, 1, t.height);
    check.range("a box's width", t.box_width, 1, t.width);
    check.range("a box's top", t.top, 0, t.height - t.box_height);
    check.range("a box's left", t.left, 0, t.width - t.box_width);
    check.range("a crop's height", t.crop_height, 1, kMostPixels);
    check.range("a crop's width", t.crop_width, 1, kMostPixels);
    check.reads("the image", c[0], check.product("an image", {output.channels, t.height, t.width}), 1, i);
    check.writes("the crop", c[9], check.product("a crop", {output.channels, t.crop_height, t.crop_width}),
                 output.bfloat16 ? 2 : 4, i);
    for (int k = 0; k < 4; ++k) {
      check.range("order", c[14 + k], -1, 3);
      t.order[k] = static_cast<int>(c[14 + k]);
      t.factors[k] = f[k];
    }
    for (int operation : t.order) {
      if (operation >= 0 && !(std::abs(t.factors[operation]) <= 65536)) {
        check.refuse("factors must be finite, of at most 65536; got " + std::to_string(t.factors[operation]));
      }
    }
    if (t.blur && !(t.radius >= 0 && t.radius <= 65536)) {
      check.refuse("the blur's radius must be 0 to 65536 pixels; got " + std::to_string(t.radius));
    }
  }
  check.no_overlaps();
  return tasks;
}

#ifdef DINO_FAST_HAS_CUDA
// Plans are given as (address, tensors, chunks); the stream is torch.cuda.current_stream().cuda_stream.
dino_fast::cuda::Plan as_plan(const char* operation, uint64_t base, uint32_t tensors, uint32_t chunks) {
  Validator check(operation);
  check.range("tensors", tensors, 1);
  if (base == 0) check.refuse("the plan's address is null");
  if (base % 16 != 0) check.refuse("the plan's address must be a multiple of 16; got " + std::to_string(base));
  return {base, tensors, chunks};
}

void bind_cuda(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("cuda_multi_tensor_chunk") = dino_fast::cuda::chunk_elements();
  m.def("cuda_multi_tensor_offsets", [](uint32_t tensors, uint32_t chunks) {
    Validator("cuda_multi_tensor_offsets").range("tensors", tensors, 1);
    const dino_fast::cuda::Offsets at = dino_fast::cuda::offsets_of(tensors, chunks);
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
    dino_fast::cuda::upload(address, data, size, stream);
  });
  m.def(
      "cuda_multi_tensor_fill_chunks",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t stream) {
        dino_fast::cuda::fill_chunks(as_plan("cuda_multi_tensor_fill_chunks", base, tensors, chunks), stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_norms",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t to, uint64_t stream) {
        if (to == 0) Validator("cuda_multi_tensor_norms").refuse("the norms' address is null");
        dino_fast::cuda::norms(as_plan("cuda_multi_tensor_norms", base, tensors, chunks), to, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_adamw_ema",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t multipliers, uint64_t found_inf, uint64_t stream) {
        dino_fast::cuda::adamw_ema(as_plan("cuda_multi_tensor_adamw_ema", base, tensors, chunks), multipliers,
                                   found_inf, stream);
      },
      Unlocked());
  m.def(
      "cuda_multi_tensor_ema_update",
      [](uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t found_inf, uint64_t stream) {
        dino_fast::cuda::ema_update(as_plan("cuda_multi_tensor_ema_update", base, tensors, chunks), found_inf, stream);
      },
      Unlocked());

  // The table is written to memory of `table_bytes` and copied to the start of `memory_bytes` on the device.
  using dino_fast::cuda::CropTable;
  py::class_<CropTable>(m, "CudaMultiCropTable")
      .def_property_readonly("table_bytes", [](const CropTable& table) { return table.bytes.size(); })
      .def_readonly("memory_bytes", &CropTable::memory)
      .def("write", [](const CropTable& table, int64_t to) {
        if (to == 0) Validator("CudaMultiCropTable.write").refuse("the address is null");
        std::memcpy(address<void>(to), table.bytes.data(), table.bytes.size());
      });
  m.def("cuda_multi_crop_table", [](int64_t n, const py::buffer& table, const py::buffer& numbers, int channels,
                                    bool bfloat16, bool may_go_down_first, int64_t mean, int64_t std) {
    Validator check("cuda_multi_crop_table");
    const dino_fast::CropOutput output{channels, bfloat16, may_go_down_first, address<float>(mean), address<float>(std)};
    const std::vector<dino_fast::CropTask> tasks = crop_tasks(check, n, table, numbers, output);
    py::gil_scoped_release unlocked;
    return dino_fast::cuda::plan_crops(tasks.data(), n, output);
  });
  m.def(
      "cuda_multi_crop",
      [](const CropTable& table, uint64_t base, uint64_t stream) {
        if (base == 0) Validator("cuda_multi_crop").refuse("the plan's address is null");
        dino_fast::cuda::CropPlan plan = table.plan;
        plan.base = base;
        dino_fast::cuda::multi_crop(plan, stream);
      },
      Unlocked());
}
#endif

using LogitsTuple = std::tuple<int64_t, int, int64_t, int64_t>;  // address, LogitType, crop stride, image stride

// gradient: the address that is written; where it is the student's, whose rows lie without gaps, it takes their place.
dino_fast::DinoLossProblem as_problem(Validator& check, const LogitsTuple& student, const LogitsTuple& teacher,
                                      int64_t center, const std::vector<float>& pair_weights,
                                      std::tuple<int64_t, int64_t, int64_t> shape, std::tuple<double, double> temps,
                                      int threads, int64_t gradient) {
  const int64_t V = std::get<0>(shape), B = std::get<1>(shape), K = std::get<2>(shape);
  check.range("V", V, 1, INT64_MAX / 4);
  check.range("B", B, 1);
  check.range("K", K, 1);
  check.threads(threads);
  check.positive("the student's temperature", std::get<0>(temps));
  check.positive("the teacher's temperature", std::get<1>(temps));
  if (static_cast<int64_t>(pair_weights.size()) != 2 * V) {
    check.refuse("pair_weights are [2, V], here " + std::to_string(2 * V) + "; got " +
                 std::to_string(pair_weights.size()));
  }
  check.reads("the center", center, K);
  const auto logits = [&](const char* name, const LogitsTuple& t, int64_t crops, int64_t written) {
    const auto [data, type, crop_stride, image_stride] = t;
    const int64_t bytes = check.dtype(name, type);
    const int64_t extent = check.extent(name, {crops, B, K}, {crop_stride, image_stride, 1});
    const bool without_gaps = (B == 1 || image_stride == K) && (crops == 1 || crop_stride == B * K);
    if (data == 0 || data != written || !without_gaps) check.reads(name, data, extent, bytes);
    return dino_fast::Logits{address<void>(data), static_cast<dino_fast::LogitType>(type), crop_stride, image_stride};
  };
  const dino_fast::Logits student_logits = logits("student", student, V, gradient);
  const dino_fast::Logits teacher_logits = logits("teacher", teacher, 2, 0);
  if (gradient != 0) {
    const int64_t bytes = check.dtype("student", std::get<1>(student));
    check.writes("the gradient", gradient, check.product("the gradient", {V, B, K}), bytes);
  }
  return {student_logits, teacher_logits, address<float>(center), pair_weights.data(), V, B, K, std::get<0>(temps),
          std::get<1>(temps), threads};
}

// shape is (V, B, K), temps (student, teacher), pair_weights 2 x V. Results as in cpu/dino_loss.h; gradient 0: not
// wanted.
void dino_loss_forward(const LogitsTuple& student, const LogitsTuple& teacher, int64_t center,
                       const std::vector<float>& pair_weights, std::tuple<int64_t, int64_t, int64_t> shape,
                       std::tuple<double, double> temps, int threads, int64_t loss, int64_t teacher_mean,
                       int64_t teacher_entropy, int64_t row_statistics, int64_t gradient) {
  Validator check("dino_loss_forward");
  const auto problem = as_problem(check, student, teacher, center, pair_weights, shape, temps, threads, gradient);
  check.writes("loss", loss, 1);
  check.writes("teacher_mean", teacher_mean, problem.K);
  check.writes("teacher_entropy", teacher_entropy, 1);
  check.writes("row_statistics", row_statistics, check.product("row_statistics", {2, problem.V + 2, problem.B}));
  check.no_overlaps();
  const dino_fast::DinoLossResult result{address<float>(loss), address<float>(teacher_mean),
                                         address<float>(teacher_entropy), address<float>(row_statistics),
                                         address<void>(gradient)};
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(dino_loss_forward)(problem, result);
}

void dino_loss_gradient(const LogitsTuple& student, const LogitsTuple& teacher, int64_t center,
                        const std::vector<float>& pair_weights, std::tuple<int64_t, int64_t, int64_t> shape,
                        std::tuple<double, double> temps, int threads, int64_t row_statistics, double upstream,
                        int64_t gradient) {
  Validator check("dino_loss_gradient");
  const auto problem = as_problem(check, student, teacher, center, pair_weights, shape, temps, threads, gradient);
  if (gradient == 0) check.refuse("the gradient is a null address");
  check.reads("row_statistics", row_statistics, check.product("row_statistics", {2, problem.V + 2, problem.B}));
  check.no_overlaps();
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(dino_loss_gradient)(problem, address<float>(row_statistics), upstream, address<void>(gradient));
}

// The tile is (logits, center, T, V, images, columns, 1 / teacher's temperature, 1 / student's), as in
// cpu/linear_dino_loss.h.
using TileTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double>;

dino_fast::LogitTile as_tile(Validator& check, const TileTuple& t, int threads) {
  const auto [logits, center, T, V, images, columns, inverse_teacher_temp, inverse_student_temp] = t;
  check.range("T", T, 1, INT32_MAX);
  check.range("V", V, 1, INT32_MAX);
  check.range("images", images, 1);
  check.range("columns", columns, 1);
  check.threads(threads);
  check.positive("1 / the teacher's temperature", inverse_teacher_temp);
  check.positive("1 / the student's temperature", inverse_student_temp);
  check.writes("logits", logits, check.product("logits", {T + V, images, columns}));
  check.reads("the center", center, columns);
  return {address<float>(logits), address<float>(center), T, V, images, columns, inverse_teacher_temp,
          inverse_student_temp};
}

// read 0: the rows read elsewhere, and nothing has to be scaled.
void linear_dino_loss_attend(const TileTuple& tile_args, int64_t maxima, int64_t sums, int64_t pairs, int64_t read,
                             int64_t readers, int64_t width, int threads) {
  Validator check("linear_dino_loss_attend");
  const dino_fast::LogitTile tile = as_tile(check, tile_args, threads);
  const int64_t rows = check.product("rows", {tile.T + tile.V, tile.images});
  if (readers != 0 && readers != rows) {
    check.refuse("readers are all " + std::to_string(rows) + " rows or 0; got " + std::to_string(readers));
  }
  check.range("width", width, 0);
  check.writes("maxima", maxima, rows);
  check.writes("sums", sums, rows, 8);
  check.writes("pairs", pairs, check.product("pairs", {tile.T, tile.V, tile.images}), 8);
  if (read != 0) check.writes("read", read, check.product("read", {readers, width}));
  check.no_overlaps();
  const dino_fast::RowState state{address<float>(maxima), address<double>(sums), address<double>(pairs),
                                  address<float>(read), readers, read != 0 ? width : 0};
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_attend)(tile, state, threads);
}

void linear_dino_loss_weigh(const TileTuple& tile_args, int64_t maxima, int64_t factors, int64_t pair_factors,
                            int threads) {
  Validator check("linear_dino_loss_weigh");
  const dino_fast::LogitTile tile = as_tile(check, tile_args, threads);
  if (maxima != 0) check.reads("maxima", maxima, check.product("rows", {tile.T + tile.V, tile.images}));
  check.reads("factors", factors, check.product("factors", {tile.V, tile.images}));
  check.reads("pair_factors", pair_factors, check.product("pair_factors", {tile.T, tile.V, tile.images}));
  check.no_overlaps();
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_weigh)
  (tile, address<float>(maxima), address<float>(factors), address<float>(pair_factors), threads);
}

void linear_dino_loss_normalize(int64_t weight, int64_t gain, int64_t effective, int64_t n, int64_t width, int threads) {
  Validator check("linear_dino_loss_normalize");
  check.threads(threads);
  const int64_t elements = check.product("the weight", {n, width});
  if (effective == 0 || effective != weight) check.reads("the weight", weight, elements);
  check.reads("the gain", gain, n);
  check.writes("the effective weight", effective, elements);
  check.no_overlaps();
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_normalize)
  (address<float>(weight), address<float>(gain), address<float>(effective), n, width, threads);
}

void linear_dino_loss_project(int64_t gradient, int64_t weight, int64_t gain, int64_t gain_gradient, int64_t n,
                              int64_t width, int threads) {
  Validator check("linear_dino_loss_project");
  check.threads(threads);
  const int64_t elements = check.product("the weight", {n, width});
  check.writes("the gradient", gradient, elements);
  check.reads("the weight", weight, elements);
  check.reads("the gain", gain, n);
  check.writes("the gain's gradient", gain_gradient, n);
  check.no_overlaps();
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_project)
  (address<float>(gradient), address<float>(weight), address<float>(gain), address<float>(gain_gradient), n, width,
   threads);
}

// Address, rows, columns, strides of rows and of columns.
using MatrixTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

dino_fast::Matrix as_matrix(Validator& check, const char* name, const MatrixTuple& x) {
  const auto [data, rows, columns, row_stride, column_stride] = x;
  check.range("a matrix's rows", rows, 1);
  check.range("a matrix's columns", columns, 1);
  check.reads(name, data, check.extent(name, {rows, columns}, {row_stride, column_stride}));
  if (row_stride != 1 && column_stride != 1) {
    check.refuse(std::string("rows or columns of ") + name + " must be contiguous; got strides " +
                 std::to_string(row_stride) + " and " + std::to_string(column_stride));
  }
  return {address<const float>(data), rows, columns, row_stride, column_stride};
}

void matmul(const MatrixTuple& a_args, const MatrixTuple& b_args, int64_t bias, bool add, int64_t out, int64_t out_row,
            int threads) {
  Validator check("matmul");
  check.threads(threads);
  const dino_fast::Matrix a = as_matrix(check, "a", a_args), b = as_matrix(check, "b", b_args);
  if (a.columns != b.rows) {
    check.refuse("a has " + std::to_string(a.columns) + " columns but b " + std::to_string(b.rows) + " rows");
  }
  if (a.rows > 1) check.range("the stride of out's rows", out_row, b.columns);
  check.writes("out", out, check.extent("out", {a.rows, b.columns}, {out_row, 1}));
  if (bias != 0) check.reads("bias", bias, b.columns);
  if (bias != 0 && add) check.refuse("there is a bias or what is in out to add to, not both");
  check.no_overlaps();
  if (const char* reason = dino_fast::matmul_unavailable_reason()) throw std::runtime_error(std::string("matmul: ") + reason);
  py::gil_scoped_release unlocked;
  dino_fast::matmul(a, b, address<const float>(bias), add, address<float>(out), out_row, threads);
}

// (qkv, strides of token, part and head, ends, sequences, tokens, heads, width, dtype)
using SequencesTuple =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// Whoever else has the ends may change them while the kernels run: these work from a copy that was checked.
class CheckedSequences {
 public:
  CheckedSequences(Validator& check, const SequencesTuple& t, int threads) {
    const auto [qkv, token_stride, part_stride, head_stride, ends, count, tokens, heads, width, dtype] = t;
    check.threads(threads);
    check.range("sequences", count, 0, INT32_MAX);
    check.range("tokens", tokens, 0, INT32_MAX);
    check.range("heads", heads, 1);
    check.range("a head's width", width, 1);
    bytes = check.dtype("qkv", dtype);
    const int64_t extent =
        check.extent("qkv", {tokens, 3, heads, width}, {token_stride, part_stride, head_stride, 1});
    check.reads("qkv", qkv, extent, bytes);
    rows = check.product("the output", {tokens, heads});
    elements = check.product("the output", {rows, width});
    check.product("the gradient", {elements, 3});
    check.reads("the ends", ends, count + 1);
    check.product("the heads of all sequences", {count, heads});
    const int32_t* given = address<int32_t>(ends);
    ends_.assign(given, given + count + 1);
    if (ends_.front() != 0 || ends_.back() != tokens || !std::is_sorted(ends_.begin(), ends_.end())) {
      check.refuse("the ends begin with 0, never fall and end with the number of tokens, " + std::to_string(tokens) +
                   "; got " + std::to_string(ends_.front()) + " to " + std::to_string(ends_.back()) +
                   (std::is_sorted(ends_.begin(), ends_.end()) ? "" : ", which fall in between"));
    }
    sequences = {address<void>(qkv), token_stride, part_stride, head_stride, ends_.data(), count, tokens, heads, width,
                 static_cast<dino_fast::Float>(dtype)};
  }
  CheckedSequences(const CheckedSequences&) = delete;
  CheckedSequences& operator=(const CheckedSequences&) = delete;

  dino_fast::Sequences sequences;
  int64_t bytes, rows, elements;  // of an element; in [tokens, heads] and [tokens, heads, width]

 private:
  std::vector<int32_t> ends_;
};

void packed_attention_forward(const SequencesTuple& given, int64_t out, int64_t logsumexp, int threads) {
  Validator check("packed_attention_forward");
  const CheckedSequences all(check, given, threads);
  check.writes("out", out, all.elements, all.bytes);
  check.writes("logsumexp", logsumexp, all.rows);
  check.no_overlaps();
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(packed_attention_forward)(all.sequences, address<void>(out), address<float>(logsumexp), threads);
}

void packed_attention_backward(const SequencesTuple& given, int64_t grad_out, int64_t gradient, int threads) {
  Validator check("packed_attention_backward");
  const CheckedSequences all(check, given, threads);
  check.reads("the output's gradient", grad_out, all.elements, all.bytes);
  check.writes("the gradient", gradient, 3 * all.elements, all.bytes);
  check.no_overlaps();
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(packed_attention_backward)
  (all.sequences, address<void>(grad_out), address<void>(gradient), threads);
}

void multi_crop(int64_t n, const py::buffer& table, const py::buffer& numbers, int channels, bool bfloat16,
                bool may_go_down_first, int64_t mean, int64_t std, int threads) {
  Validator check("multi_crop");
  check.threads(threads);
  const dino_fast::CropOutput output{channels, bfloat16, may_go_down_first, address<float>(mean), address<float>(std)};
  const std::vector<dino_fast::CropTask> tasks = crop_tasks(check, n, table, numbers, output);
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
  m.def("matmul_unavailable_reason", &dino_fast::matmul_unavailable_reason);
  m.def("packed_attention_forward", &packed_attention_forward);
  m.def("packed_attention_backward", &packed_attention_backward);
  m.def("multi_crop_planes", [](int64_t from, int64_t to, int64_t pixels) {
    Validator check("multi_crop_planes");
    check.range("pixels", pixels, 0);
    check.reads("the image", from, check.product("the image", {pixels, 3}), 1);
    check.writes("the planes", to, 3 * pixels, 1);
    check.no_overlaps();
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
