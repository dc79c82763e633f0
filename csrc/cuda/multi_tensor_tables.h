// The plan's tables in device memory, and which memory accesses a thread makes. Plain C++ with CUDA's qualifiers, so
// that the tests compile it for the host as well.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/block.h"
#include "cuda/multi_tensor.h"
#include "multi_tensor_math.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dino_fast {
namespace cuda {

// 8 vectors of 4 elements a thread: about 320 KB of traffic a block, against which reading the tables is small, and
// still thousands of blocks for a ViT-S, so that the last wave is a small part of the whole.
constexpr int64_t CHUNK = 8192;
constexpr int VECTOR = 4;  // 16 bytes of float32; neighbouring threads then touch neighbouring vectors in every dtype

enum Kind : uint32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

struct Entry {
  uint64_t param;         // float32 master weights; of `param_kind` in an EMA-only plan
  uint64_t exp_avg;       // float32
  uint64_t exp_avg_sq;    // float32
  uint64_t teacher;       // float32; of `teacher_kind` in an EMA-only plan
  uint64_t param_copy;    // bfloat16
  uint64_t teacher_copy;  // bfloat16
  uint64_t step;          // float32 scalar
  int64_t count;          // elements
  uint32_t first_chunk;
  uint16_t param_kind;
  uint16_t teacher_kind;
};
static_assert(sizeof(Entry) == 72, "packed by dino_fast/ops/multi_tensor/cuda.py");

struct Gradient {
  uint64_t address;
  uint64_t kind;
};
static_assert(sizeof(Gradient) == 16, "packed by dino_fast/ops/multi_tensor/cuda.py");

struct Chunk {
  uint32_t tensor;
  uint32_t index;  // elements [index * CHUNK, (index + 1) * CHUNK) of the tensor
};

// float64, since 1 - 0.999 in float32 is off by 5e-5
struct Hyper {
  double beta1, beta2, eps, momentum;
};
struct Rates {
  double lr, weight_decay;
};

constexpr uint32_t NOTHING = 2;

// `found_inf` of a step that must leave everything as it is.
DINO_FAST_BOTH bool holds_all(const float* found_inf) { return found_inf != nullptr && *found_inf > 3.4028234e38f; }

struct Factors {  // of one tensor at this step
  AdamWScalars adamw;
  EmaScalars ema;
  uint32_t update;  // 1; 0: an overflow was found, only teacher and copies are written; NOTHING: not even these
};

struct Tables {
  const Hyper* hyper;
  const Rates* rates;
  const Gradient* gradients;
  const Entry* entries;
  Factors* factors;
  uint32_t* tickets;  // [tensors], zero between launches
  double* partials;   // [chunks]
  Chunk* chunks;
};

DINO_FAST_BOTH uint64_t place(uint64_t& end, uint64_t bytes) {
  const uint64_t start = end;
  end = (end + bytes + 15) / 16 * 16;
  return start;
}

DINO_FAST_BOTH Offsets offsets(uint64_t tensors, uint64_t chunks) {
  Offsets at;
  uint64_t end = 0;
  at.hyper = place(end, sizeof(Hyper) + tensors * sizeof(Rates));
  at.gradients = place(end, tensors * sizeof(Gradient));
  at.entries = place(end, tensors * sizeof(Entry));
  at.factors = place(end, tensors * sizeof(Factors));
  at.tickets = place(end, tensors * sizeof(uint32_t));
  at.partials = place(end, chunks * sizeof(double));
  at.chunks = place(end, chunks * sizeof(Chunk));
  at.bytes = end;
  return at;
}

DINO_FAST_BOTH Tables tables_of(const Plan& plan) {
  const Offsets at = offsets(plan.tensors, plan.chunks);
  return {reinterpret_cast<const Hyper*>(plan.base + at.hyper),
          reinterpret_cast<const Rates*>(plan.base + at.hyper + sizeof(Hyper)),
          reinterpret_cast<const Gradient*>(plan.base + at.gradients),
          reinterpret_cast<const Entry*>(plan.base + at.entries),
          reinterpret_cast<Factors*>(plan.base + at.factors),
          reinterpret_cast<uint32_t*>(plan.base + at.tickets),
          reinterpret_cast<double*>(plan.base + at.partials),
          reinterpret_cast<Chunk*>(plan.base + at.chunks)};
}

// ---- elements ----

DINO_FAST_BOTH float to_float(float x) { return x; }
DINO_FAST_BOTH float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
DINO_FAST_BOTH float to_float(float16 x) {
#ifdef __CUDACC__
  return __half2float(__half(__half_raw{x.bits}));
#else
  _Float16 half;
  memcpy(&half, &x.bits, sizeof half);
  return float(half);
#endif
}

DINO_FAST_BOTH void from_float(float x, float& y) { y = x; }
DINO_FAST_BOTH void from_float(float x, bfloat16& y) {
#ifdef __CUDACC__
  y.bits = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  // to nearest, ties to even; a NaN must not round to infinity
  y.bits = uint16_t(x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
DINO_FAST_BOTH void from_float(float x, float16& y) {
#ifdef __CUDACC__
  y.bits = static_cast<__half_raw>(__float2half_rn(x)).x;
#else
  const _Float16 half = _Float16(x);
  memcpy(&y.bits, &half, sizeof half);
#endif
}

#if !defined(__CUDACC__) && defined(DINO_FAST_COUNT_BYTES)
extern uint64_t bytes_moved;  // the test that holds the kernels to their formula
#define DINO_FAST_MOVED(bytes) (bytes_moved += (bytes))
#else
#define DINO_FAST_MOVED(bytes) (void)0
#endif

// Addresses come out of tables as numbers: say that they are not shared memory, for ld.global and not generic loads.
#ifdef __CUDA_ARCH__
#define DINO_FAST_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define DINO_FAST_GLOBAL(pointer) (void)0
#endif

template <int N, class T>
struct alignas(N * sizeof(T)) Pack {  // aligned, so that the compiler moves it in one access
  T value[N];
};

template <int N, class T>
DINO_FAST_BOTH void load(const T* from, uint32_t i, float (&x)[N]) {
  DINO_FAST_MOVED(N * sizeof(T));
  DINO_FAST_GLOBAL(from);
  const Pack<N, T> pack = *reinterpret_cast<const Pack<N, T>*>(from + i);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = to_float(pack.value[k]);
}

template <int N, class T>
DINO_FAST_BOTH void store(T* to, uint32_t i, const float (&x)[N]) {
  DINO_FAST_MOVED(N * sizeof(T));
  DINO_FAST_GLOBAL(to);
  Pack<N, T> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) from_float(x[k], pack.value[k]);
  *reinterpret_cast<Pack<N, T>*>(to + i) = pack;
}

// ---- which elements go by vectors ----

// A stretch of several arrays walked together. Vectors start where all of them are aligned at once; where they never
// are (views at different offsets), every element goes alone, still neighbour beside neighbour.
struct Stretch {
  uint32_t length;
  int phase;  // (address / element size) % VECTOR, common to all arrays; -1 before the first, VECTOR: they differ

  template <class T>
  DINO_FAST_BOTH void add(const T* array) {
    if (array == nullptr) return;
    const int own = int((reinterpret_cast<uint64_t>(array) / sizeof(T)) % VECTOR);
    phase = phase == -1 || phase == own ? own : VECTOR;
  }

  DINO_FAST_BOTH uint32_t head() const {
    const uint32_t lone = phase == VECTOR ? length : phase <= 0 ? 0 : VECTOR - phase;
    return lone < length ? lone : length;
  }
};

// Work is a struct with `at<N>(i)`: its elements i .. i + N - 1. UNROLL > 1 where it only reads: more loads in flight.
template <int UNROLL, class Work>
DINO_FAST_BOTH void walk(const Stretch& stretch, uint32_t thread, Work& work) {
  const uint32_t head = stretch.head();
  const uint32_t tail = head + (stretch.length - head) / VECTOR * VECTOR;
  for (uint32_t i = thread; i < head; i += THREADS) work.template at<1>(i);
#pragma unroll UNROLL
  for (uint32_t i = head + thread * VECTOR; i < tail; i += THREADS * VECTOR)
    work.template at<VECTOR>(i);
  for (uint32_t i = tail + thread; i < stretch.length; i += THREADS) work.template at<1>(i);
}

}  // namespace cuda
}  // namespace dino_fast
