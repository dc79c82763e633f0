// packed_attention on the CPU: a sequence's rows of one head are copied into a core's caches, its products are taken
// there, and its results are written where they belong. No transposed or concatenated copy of the whole is made.
//
// FLOPs of a sequence of L tokens and one head: forward 4 L^2 d, backward 10 L^2 d (the scores once more, the weights'
// gradient, and those by q, k and v), where the columns of the scores are rounded up to whole vectors. Bytes: forward
// reads 3 L d and writes L d elements, backward reads 4 L d and writes 3 L d: 16 d L^2 over 16 d L bytes and more, so from a
// dozen tokens on the arithmetic takes longer than the memory.
//
// Scores are taken a few rows at a time, for all columns: a row's maximum, exponentials and sum are then exact in one go,
// and nothing is rescaled. What a head's sequence gives depends on itself alone: the same bits with any number of threads.
#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/multiply.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;
constexpr int64_t kRows = 48;             // of scores at a time: 48 by 80 floats fit the L1 cache, 48 by 1376 the L2
constexpr int64_t kTaskFlops = 2000000;   // handing out a task takes about a microsecond, this many about twenty

int64_t whole(int64_t n) { return (n + Vec::width - 1) / Vec::width * Vec::width; }

// Float buffers of one thread, in one block of memory that only grows.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
    // Rows of whole vectors then never straddle a cache line.
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += whole(floats);
    return taken;
  }

 private:
  float* next_;
};

// Rows of `width` elements of T, `stride` apart, and the same as floats, rows padded with zeros to whole vectors.
template <typename T> void read_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  const int64_t padded = whole(width);
  for (int64_t i = 0; i < rows; ++i, from += stride, to += padded) {
    int64_t c = 0;
    for (; c + Vec::width <= width; c += Vec::width) store(to + c, load(from + c));
    if (c < width) store(to + c, load_first(from + c, static_cast<int>(width - c), 0.0f));
  }
}
template <typename T> void write_row(const float* from, int64_t width, float factor, T* to) {
  int64_t c = 0;
  for (; c + Vec::width <= width; c += Vec::width) store(to + c, load(from + c) * Vec(factor));
  if (c < width) store_first(to + c, static_cast<int>(width - c), load(from + c) * Vec(factor));
}
template <typename T> void write_rows(const float* from, int64_t rows, int64_t width, T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) write_row(from + i * whole(width), width, 1.0f, to + i * stride);
}

// 0 for the columns of the last vector that exist, -infinity for those beyond L.
Vec beyond(int64_t L) {
  float lanes[Vec::width];
  for (int64_t j = 0; j < Vec::width; ++j) lanes[j] = whole(L) - Vec::width + j < L ? 0.0f : -kInfinity;
  return load(lanes);
}

// Scores become e^((score - maximum) scale), 0 beyond the last column; returns their maximum and sum.
struct Exponentials {
  float maximum, sum;
};
Exponentials exponentiate(float* scores, int64_t padded, Vec last_mask, float scale) {
  const int64_t last = padded - Vec::width;
  Vec maxima = load(scores + last) + last_mask;
  store(scores + last, maxima);
  for (int64_t j = 0; j < last; j += Vec::width) maxima = max(load(scores + j), maxima);
  const float maximum = reduce_max(maxima);
  const Vec m(maximum), factor(scale * kLog2E);
  Vec sums(0.0f);
  for (int64_t j = 0; j < padded; j += Vec::width) {
    const Vec e = exp2((load(scores + j) - m) * factor);
    sums = sums + e;
    store(scores + j, e);
  }
  return {maximum, reduce_add(sums)};
}

// Where one sequence's head is.
template <typename T> struct Unit {
  const Sequences& all;
  int64_t first, L, head;

  const T* part(int64_t which) const {
    return static_cast<const T*>(all.qkv) + first * all.token_stride + which * all.part_stride + head * all.head_stride;
  }
  int64_t out_stride() const { return all.heads * all.width; }
  int64_t out_at() const { return first * out_stride() + head * all.width; }
};

template <typename T> void forward_unit(const Unit<T>& unit, T* out, float* logsumexp) {
  const Sequences& all = unit.all;
  const int64_t L = unit.L, columns = whole(L), d = all.width, padded = whole(d);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const Vec last_mask = beyond(L);
  Scratch scratch(padded * (2 * columns + 2 * L + kRows) + kRows * columns);
  float *k = scratch.take(columns * padded), *k_transposed = scratch.take(columns * padded);
  float *q = scratch.take(L * padded), *v = scratch.take(L * padded);
  float *scores = scratch.take(kRows * columns), *read = scratch.take(kRows * padded);
  read_rows(unit.part(0), all.token_stride, L, d, q);
  read_rows(unit.part(1), all.token_stride, L, d, k);
  read_rows(unit.part(2), all.token_stride, L, d, v);
  std::fill(k + L * padded, k + columns * padded, 0.0f);
  transpose(k, columns, padded, k_transposed);
  for (int64_t i = 0; i < L; i += kRows) {
    const int64_t rows = std::min(kRows, L - i);
    multiply(rows, columns, {q + i * padded, padded, 1, k_transposed, columns, scores, columns, d, false});
    float inverse[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      const Exponentials e = exponentiate(scores + r * columns, columns, last_mask, scale);
      inverse[r] = 1.0f / e.sum;
      logsumexp[i + r] = e.maximum * scale + std::log(e.sum);
    }
    multiply(rows, padded, {scores, columns, 1, v, padded, read, padded, L, false});
    for (int64_t r = 0; r < rows; ++r) {
      write_row(read + r * padded, d, inverse[r], out + unit.out_at() + (i + r) * unit.out_stride());
    }
  }
}

// A row's exponentials become weights p, and the weights' gradient dp that of the scores, p (dp - sum p dp) scale.
void differentiate(float* weights, float* gradient, int64_t padded, float sum, float scale) {
  const Vec inverse(1.0f / sum), factor(scale);
  Vec sums(0.0f);
  for (int64_t j = 0; j < padded; j += Vec::width) {
    const Vec p = load(weights + j) * inverse;
    store(weights + j, p);
    sums = fma(p, load(gradient + j), sums);
  }
  const Vec mean(reduce_add(sums));
  for (int64_t j = 0; j < padded; j += Vec::width) {
    store(gradient + j, load(weights + j) * (load(gradient + j) - mean) * factor);
  }
}

template <typename T> void backward_unit(const Unit<T>& unit, const T* grad_out, T* gradient) {
  const Sequences& all = unit.all;
  const int64_t L = unit.L, columns = whole(L), d = all.width, padded = whole(d);
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const Vec last_mask = beyond(L);
  Scratch scratch(padded * (4 * columns + 4 * L + kRows) + 2 * kRows * columns);
  float *k = scratch.take(columns * padded), *v = scratch.take(columns * padded);
  float *k_transposed = scratch.take(columns * padded), *v_transposed = scratch.take(columns * padded);
  float *q = scratch.take(L * padded), *grad_rows = scratch.take(L * padded);
  float *grad_k = scratch.take(L * padded), *grad_v = scratch.take(L * padded), *grad_q = scratch.take(kRows * padded);
  float *weights = scratch.take(kRows * columns), *grad_scores = scratch.take(kRows * columns);
  read_rows(unit.part(0), all.token_stride, L, d, q);
  read_rows(unit.part(1), all.token_stride, L, d, k);
  read_rows(unit.part(2), all.token_stride, L, d, v);
  read_rows(grad_out + unit.out_at(), unit.out_stride(), L, d, grad_rows);
  std::fill(k + L * padded, k + columns * padded, 0.0f);
  std::fill(v + L * padded, v + columns * padded, 0.0f);
  transpose(k, columns, padded, k_transposed);
  transpose(v, columns, padded, v_transposed);

  const int64_t stride = 3 * unit.out_stride();
  T* to = gradient + unit.first * stride + unit.head * d;
  for (int64_t i = 0; i < L; i += kRows) {
    const int64_t rows = std::min(kRows, L - i);
    const float *own_q = q + i * padded, *own_grad_out = grad_rows + i * padded;
    multiply(rows, columns, {own_q, padded, 1, k_transposed, columns, weights, columns, d, false});
    multiply(rows, columns, {own_grad_out, padded, 1, v_transposed, columns, grad_scores, columns, d, false});
    for (int64_t r = 0; r < rows; ++r) {
      const Exponentials e = exponentiate(weights + r * columns, columns, last_mask, scale);
      differentiate(weights + r * columns, grad_scores + r * columns, columns, e.sum, scale);
    }
    multiply(rows, padded, {grad_scores, columns, 1, k, padded, grad_q, padded, L, false});
    multiply(L, padded, {grad_scores, 1, columns, own_q, padded, grad_k, padded, rows, i > 0});
    multiply(L, padded, {weights, 1, columns, own_grad_out, padded, grad_v, padded, rows, i > 0});
    write_rows(grad_q, rows, d, to + i * stride, stride);
  }
  write_rows(grad_k, L, d, to + unit.out_stride(), stride);
  write_rows(grad_v, L, d, to + 2 * unit.out_stride(), stride);
}

// Calls body(unit) for every head of every sequence; short ones many to a task.
template <typename T, typename Body> void for_each_unit(const Sequences& all, int threads, const Body& body) {
  std::vector<int64_t> first{0};  // units of task t are first[t] up to first[t + 1]; unit u is sequence u / heads
  int64_t filled = 0;
  for (int64_t u = 0; u < all.count * all.heads; ++u) {
    const int64_t L = all.ends[u / all.heads + 1] - all.ends[u / all.heads];
    if (filled > 0 && filled + L * L * all.width * 4 > kTaskFlops) {
      first.push_back(u);
      filled = 0;
    }
    filled += L * L * all.width * 4;
  }
  first.push_back(all.count * all.heads);
  parallel_for(static_cast<int64_t>(first.size()) - 1, threads, [&](int64_t task) {
    const FlushSubnormals flush;
    for (int64_t u = first[task]; u < first[task + 1]; ++u) {
      const int64_t s = u / all.heads, begin = all.ends[s], L = all.ends[s + 1] - begin;
      if (L > 0) body(Unit<T>{all, begin, L, u % all.heads});
    }
  });
}

template <typename Body> void dispatch_type(Float dtype, const Body& body) {
  if (dtype == Float::float32) body(static_cast<float*>(nullptr));
  else if (dtype == Float::bfloat16) body(static_cast<bf16*>(nullptr));
  else body(static_cast<f16*>(nullptr));
}

}  // namespace

void packed_attention_forward(const Sequences& all, void* out, float* logsumexp, int threads) {
  dispatch_type(all.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_unit<T>(all, threads, [&](const Unit<T>& unit) {
      forward_unit<T>(unit, static_cast<T*>(out), logsumexp + unit.head * all.tokens + unit.first);
    });
  });
}

void packed_attention_backward(const Sequences& all, const void* grad_out, void* gradient, int threads) {
  dispatch_type(all.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_unit<T>(all, threads, [&](const Unit<T>& unit) {
      backward_unit<T>(unit, static_cast<const T*>(grad_out), static_cast<T*>(gradient));
    });
  });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
