// The passes of linear_dino_loss between its matrix products.
#include "bindings/bindings.h"

#include <tuple>

#include "cpu/linear_dino_loss.h"

namespace dino_fast::bindings {
namespace {

// The tile is (logits, center, T, V, images, columns, 1 / teacher's temperature, 1 / student's), as in
// cpu/linear_dino_loss.h.
using TileTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double>;

LogitTile as_tile(Validator& check, const TileTuple& t, int threads) {
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
  const LogitTile tile = as_tile(check, tile_args, threads);
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
  const RowState state{address<float>(maxima), address<double>(sums), address<double>(pairs),
                                  address<float>(read), readers, read != 0 ? width : 0};
  py::gil_scoped_release release;
  DINO_FAST_DISPATCH(linear_dino_loss_attend)(tile, state, threads);
}

void linear_dino_loss_weigh(const TileTuple& tile_args, int64_t maxima, int64_t factors, int64_t pair_factors,
                            int threads) {
  Validator check("linear_dino_loss_weigh");
  const LogitTile tile = as_tile(check, tile_args, threads);
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

}  // namespace

void bind_linear_dino_loss(py::module_& m) {
  m.def("linear_dino_loss_attend", &linear_dino_loss_attend);
  m.def("linear_dino_loss_weigh", &linear_dino_loss_weigh);
  m.def("linear_dino_loss_normalize", &linear_dino_loss_normalize);
  m.def("linear_dino_loss_project", &linear_dino_loss_project);
}

}  // namespace dino_fast::bindings
