// The arithmetic of one element of multi_tensor, shared by the CPU kernels (V a vector of floats) and CUDA (V a float).
//
//   m1 <- m1 + (1 - b1) (c g - m1)        m2 <- b2 m2 + (1 - b2) (c g)^2
//   p  <- (1 - lr wd) p - lr / (1 - b1^k) * m1 / (sqrt(m2) / sqrt(1 - b2^k) + eps)
//   t  <- m t + (1 - m) p
//
// c is the clip coefficient over the gradient scale, k the step counted from 1. Scalars of a tensor are
// computed once in double and rounded to float32: 1 - b2^k in float32 would be off by 3e-5 at the first step.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DINO_FAST_SHARED __host__ __device__ __forceinline__
#else
#define DINO_FAST_SHARED inline __attribute__((always_inline))
#endif

namespace dino_fast {

// Everything about one tensor's AdamW step that is the same for all its elements.
struct AdamWScalars {
  float gradient;   // c
  float decay;      // 1 - lr wd
  float beta2;      // b2
  float take1;      // 1 - b1
  float take2;      // 1 - b2
  float step_size;  // lr / (1 - b1^k)
  float root2;      // 1 / sqrt(1 - b2^k)
  float eps;
};

// k: this step's number, from 1.
DINO_FAST_SHARED AdamWScalars adamw_scalars(double k, double lr, double weight_decay, double beta1, double beta2,
                                            double eps, float gradient) {
  AdamWScalars s;
  s.gradient = gradient;
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.beta2 = static_cast<float>(beta2);
  s.take1 = static_cast<float>(1.0 - beta1);
  s.take2 = static_cast<float>(1.0 - beta2);
  s.step_size = static_cast<float>(lr / (1.0 - pow(beta1, k)));
  s.root2 = static_cast<float>(1.0 / ::sqrt(1.0 - pow(beta2, k)));
  s.eps = static_cast<float>(eps);
  return s;
}

// fma(a, b, c) = a*b + c and sqrt(a) must exist for V.
template <typename V>
DINO_FAST_SHARED void adamw_element(const AdamWScalars& s, V g, V& p, V& m1, V& m2) {
  g = g * V(s.gradient);
  m1 = fma(V(s.take1), g - m1, m1);
  m2 = fma(V(s.take2) * g, g, V(s.beta2) * m2);
  const V update = m1 / fma(sqrt(m2), V(s.root2), V(s.eps));
  p = fma(V(s.decay), p, V(-s.step_size) * update);
}

// The EMA as an interpolation from the nearer end, so that momentum 0 gives exactly p, momentum 1 exactly t (for finite
// numbers), and a teacher equal to its student stays so. With weights m and 1 - m rounded apart it would drift.
struct EmaScalars {
  bool from_teacher;  // m > 1/2
  float rate;         // from_teacher: 1 - m, else -m
};

DINO_FAST_SHARED EmaScalars ema_scalars(double momentum) {
  EmaScalars s;
  s.from_teacher = momentum > 0.5;
  s.rate = static_cast<float>(s.from_teacher ? 1.0 - momentum : -momentum);
  return s;
}

template <typename V>
DINO_FAST_SHARED V ema_element(const EmaScalars& s, V t, V p) {
  return fma(V(s.rate), p - t, s.from_teacher ? t : p);
}

}  // namespace dino_fast
