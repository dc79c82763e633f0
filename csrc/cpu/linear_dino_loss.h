// The epilogues of the loss without logits; the mathematics is at the head of dino_fast/ops/linear_dino_loss.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace dino_fast {

// A tile of logits, some rows by some columns (prototypes), fresh from a matrix product and overwritten in place.
struct LogitTile {
  float* logits;        // [rows, columns]
  const float* scale;   // [columns], multiplies every row; null: nothing does
  const float* center;  // [columns], then taken away from every row; null: nothing is
  int64_t rows, columns;
  double inverse_temp;
};

}  // namespace dino_fast

DINO_FAST_DECLARE(
  // With x = scale logit - center, logits become value_scale e^((x - m) / temperature), m the largest x that the row has
  // had in this tile and the tiles before. `maxima` and `sums` [rows] carry the row from tile to tile (-infinity and 0
  // before the first); where m grows, the sum and the row of `read` [rows, width] (null: there is none) are scaled to it.
  // `value_scale` [columns] may be null.
  void linear_dino_loss_attend(const ::dino_fast::LogitTile& tile, const float* value_scale, float* maxima, float* sums,
                               float* read, int64_t width, int threads);
  // Logits become factor e^((x - maximum) / temperature), a maximum and a factor for each row.
  void linear_dino_loss_weigh(const ::dino_fast::LogitTile& tile, const float* maxima, const float* factors, int threads);
  // scale[k] = gain[k] / |weight[k]|, for n rows of `width`.
  void linear_dino_loss_scale(const float* weight, const float* gain, float* scale, int64_t n, int64_t width, int threads);
  // Turns the gradient by n rows of the effective weight into that by weight, in place, and writes the gain's.
  void linear_dino_loss_project(float* gradient, const float* weight, const float* gain, float* gain_gradient, int64_t n,
                                int64_t width, int threads);
)
