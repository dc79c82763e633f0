// dino_loss's forward and gradient on the CPU.
#include "bindings/bindings.h"

#include <tuple>
#include <vector>

#include "cpu/dino_loss.h"

namespace dino_fast::bindings {
namespace {

using LogitsTuple = std::tuple<int64_t, int, int64_t, int64_t>;  // address, LogitType, crop stride, image stride

// gradient: the address that is written; where it is the student's, whose rows lie without gaps, it takes their place.
DinoLossProblem as_problem(Validator& check, const LogitsTuple& student, const LogitsTuple& teacher,
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
    return Logits{address<void>(data), static_cast<LogitType>(type), crop_stride, image_stride};
  };
  const Logits student_logits = logits("student", student, V, gradient);
  const Logits teacher_logits = logits("teacher", teacher, 2, 0);
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
  const DinoLossResult result{address<float>(loss), address<float>(teacher_mean),
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

}  // namespace

void bind_dino_loss(py::module_& m) {
  m.def("dino_loss_forward", &dino_loss_forward);
  m.def("dino_loss_gradient", &dino_loss_gradient);
}

}  // namespace dino_fast::bindings
