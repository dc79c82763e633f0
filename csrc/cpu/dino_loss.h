// DINO's cross-entropy over pairs of crops; the mathematics is at the head of dino_loss.cpp.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace dino_fast {

enum class LogitType { float32 = 0, bfloat16 = 1, float16 = 2 };

// Logits of one network, [crops, images, K]: strides in elements, the last one 1.
struct Logits {
  const void* data;
  LogitType type;
  int64_t crop_stride, image_stride;
};

struct DinoLossProblem {
  Logits student;  // [V, B, K]
  Logits teacher;  // [2, B, K]
  const float* center;        // [K]
  const float* pair_weights;  // [2, V]: how much the pair (teacher crop, student crop) counts
  int64_t V, B, K;
  double student_temp, teacher_temp;
  int threads;
};

// Per row the maximum of the raw (teacher: centred) logits and the sum of e^((logit - maximum) / temperature).
// Two planes, [2, 2 + V, B]: maxima, sums; the teacher's two crops come first.
inline int64_t row_statistics_size(const DinoLossProblem& p) { return 2 * (2 + p.V) * p.B; }

struct DinoLossResult {
  float* loss;             // one
  float* teacher_mean;     // [K]
  float* teacher_entropy;  // one, nats
  float* row_statistics;   // [2, 2 + V, B]
  void* gradient;          // [V, B, K] contiguous, the student's type, for an upstream gradient of 1; null: not wanted.
                           // It may be the student's logits, where these are contiguous: then it takes their place.
};

}  // namespace dino_fast

DINO_FAST_DECLARE(
  void dino_loss_forward(const ::dino_fast::DinoLossProblem& problem, const ::dino_fast::DinoLossResult& result);
  void dino_loss_gradient(const ::dino_fast::DinoLossProblem& problem, const float* row_statistics, double upstream,
                          void* gradient);
)
