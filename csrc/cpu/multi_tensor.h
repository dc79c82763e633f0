// CPU kernels of multi_tensor: lists of hundreds of tensors in one call. See dino_fast/ops/multi_tensor/__init__.py.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"
#include "multi_tensor_math.h"

namespace dino_fast {

enum class Dtype : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// One tensor of each list; the row's tensors have the same number of elements in the same memory order, without gaps.
struct EmaRow {
  int64_t numel;
  void* teacher;
  const void* student;
  void* copy;  // bfloat16, or null
  Dtype teacher_dtype, student_dtype;
};

struct NormRow {
  int64_t numel;
  const void* gradient;
  Dtype gradient_dtype;
};

struct AdamWRow {
  int64_t numel;
  float* param;
  const void* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  float* teacher;      // or null: no EMA
  void* param_copy;    // bfloat16, or null
  void* teacher_copy;  // bfloat16, or null
  float* step;         // steps taken so far; counted up here
  Dtype gradient_dtype;
  double lr, weight_decay;
  float multiplier;    // of the gradient
};

struct AdamWOptions {
  double beta1, beta2, eps, momentum;
  bool skip;  // an overflow: only the EMA and the copies are made
};

}  // namespace dino_fast

DINO_FAST_DECLARE(
  void ema_update(const EmaRow* rows, int64_t n, double momentum, int threads);
  void grad_norms(const NormRow* rows, int64_t n, float* norms, int threads);
  void adamw_ema(const AdamWRow* rows, int64_t n, AdamWOptions options, int threads);
)
