// The epilogues of the loss without logits; the mathematics is at the head of dino_fast/ops/linear_dino_loss/__init__.py.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace dino_fast {

// A tile of logits of some images by some columns (prototypes), fresh from a matrix product and overwritten in place.
// Rows are crop-major, the teacher's first: row u * images + b, then row (T + v) * images + b. The state of the rows lies
// in the same order; that of the pairs of crops is [T, V, images].
struct LogitTile {
  float* logits;        // [(T + V) * images, columns]
  const float* center;  // [columns], taken away from every teacher row
  int64_t T, V, images, columns;
  double inverse_teacher_temp, inverse_student_temp;
};

// The state that the rows carry from tile to tile.
struct RowState {
  float* maxima;   // [(T + V) * images], of the logits, the teacher's centred; -infinity before the first tile
  double* sums;    // [(T + V) * images], of e^((x - maximum) / temperature); 0 before the first
  double* pairs;   // [T, V, images], of e^((t - its maximum) / its temperature) (s - its maximum) / its temperature
  float* read;     // [readers, width], scaled down where a maximum grows
  int64_t readers, width;  // all rows of the tile read, or none
};

}  // namespace dino_fast

DINO_FAST_DECLARE(
  // Carries `state` over the tile, and turns its logits into e^((x - maximum) / temperature), a row's weights of
  // the student's prototypes in its read; a student's row only where it is a reader.
  void linear_dino_loss_attend(const ::dino_fast::LogitTile& tile, const ::dino_fast::RowState& state, int threads);
  // Student rows become factors[v, b] e^((s - maximum) / temperature) - sum_u pair_factors[u, v, b] e^((t - maximum) /
  // temperature), the gradient w.r.t. the logits; teacher rows are left undefined. Without maxima (null) the tile holds
  // these exponentials already, as `attend` leaves them.
  void linear_dino_loss_weigh(const ::dino_fast::LogitTile& tile, const float* maxima, const float* factors,
                              const float* pair_factors, int threads);
  // effective[k] = gain[k] weight[k] / |weight[k]|, for n rows of `width`; may be in place.
  void linear_dino_loss_normalize(const float* weight, const float* gain, float* effective, int64_t n, int64_t width,
                                  int threads);
  // Turns the gradient w.r.t. n rows of the effective weight into that w.r.t. weight, in place, and writes the gain's.
  void linear_dino_loss_project(float* gradient, const float* weight, const float* gain, float* gain_gradient, int64_t n,
                                int64_t width, int threads);
)
