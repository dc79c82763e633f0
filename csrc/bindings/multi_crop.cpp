// multi_crop on the CPU and on CUDA.
#include "bindings/bindings.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/multi_crop.h"
#ifdef DINO_FAST_HAS_CUDA
#include "cuda/multi_crop.h"
#endif

namespace dino_fast::bindings {
namespace {

// A crop is 18 columns of whole numbers: address, height, width of the image; top, left, height, width of the box; height,
// width, address of the result; flip, grey, blur, solarize; order [4]. And 5 of float: factors [4], radius. Rows first.
std::vector<CropTask> crop_tasks(Validator& check, int64_t n, const py::buffer& table,
                                            const py::buffer& numbers, const CropOutput& output) {
  constexpr int64_t kMostPixels = INT32_MAX;  // on a side
  const py::buffer_info info = table.request(), numbers_info = numbers.request();
  const int64_t* c = columns<int64_t>(check, info, n, 18);
  const float* f = columns<float>(check, numbers_info, n, 5);
  check.range("channels", output.channels, 1, 16);
  check.reads("mean", reinterpret_cast<intptr_t>(output.mean), output.channels);
  check.reads("std", reinterpret_cast<intptr_t>(output.std), output.channels);
  std::vector<CropTask> tasks(n);
  for (int64_t i = 0; i < n; ++i, c += 18, f += 5) {
    CropTask& t = tasks[i];
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

void multi_crop(int64_t n, const py::buffer& table, const py::buffer& numbers, int channels, bool bfloat16,
                bool may_go_down_first, int64_t mean, int64_t std, int threads) {
  Validator check("multi_crop");
  check.threads(threads);
  const CropOutput output{channels, bfloat16, may_go_down_first, address<float>(mean), address<float>(std)};
  const std::vector<CropTask> tasks = crop_tasks(check, n, table, numbers, output);
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(multi_crop)(tasks.data(), n, output, threads);
}

}  // namespace

void bind_multi_crop(py::module_& m) {
  m.def("multi_crop", &multi_crop);
  m.def("multi_crop_planes", [](int64_t from, int64_t to, int64_t pixels) {
    Validator check("multi_crop_planes");
    check.range("pixels", pixels, 0);
    check.reads("the image", from, check.product("the image", {pixels, 3}), 1);
    check.writes("the planes", to, 3 * pixels, 1);
    check.no_overlaps();
    py::gil_scoped_release unlocked;
    DINO_FAST_DISPATCH(multi_crop_planes)(address<uint8_t>(from), address<uint8_t>(to), pixels);
  });
#ifdef DINO_FAST_HAS_CUDA
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  // The table is written to memory of `table_bytes` and copied to the start of `memory_bytes` on the device.
  using cuda::CropTable;
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
    const CropOutput output{channels, bfloat16, may_go_down_first, address<float>(mean), address<float>(std)};
    const std::vector<CropTask> tasks = crop_tasks(check, n, table, numbers, output);
    py::gil_scoped_release unlocked;
    return cuda::plan_crops(tasks.data(), n, output);
  });
  m.def(
      "cuda_multi_crop",
      [](const CropTable& table, uint64_t base, uint64_t stream) {
        if (base == 0) Validator("cuda_multi_crop").refuse("the plan's address is null");
        cuda::CropPlan plan = table.plan;
        plan.base = base;
        cuda::multi_crop(plan, stream);
      },
      Unlocked());
#endif
}

}  // namespace dino_fast::bindings
