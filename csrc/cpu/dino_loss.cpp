// DINO's cross-entropy over pairs of crops, on logits.
//
// For a teacher row u and a student row v of one image, with the pair's weight a(u, v) (1, or 0 where u = v):
//     p_u = softmax((t_u - c) / tau_t),   x_v = (s_v - max s_v) / tau_s,   l_v = sum_k e^x_v,
//     q_v = sum_u a(u, v) p_u,            w_v = sum_u a(u, v),             N = sum_uv a(u, v),
//     loss = 1/(B N) sum_rows (w log l - <q, x>),        dloss/ds = (w e^x / l - q) / (tau_s B N).
// A maximum is subtracted before anything is scaled, and it is stored apart from the sum, so large logits lose no bits.
//
// Passes over memory, with e bytes a logit:
//   1. `teacher_chunk`  reads the teacher: maxima, sums, entropies, and the mean over rows.        2 e B K
//   2. `student_rows`   takes a group of one image's student rows that fits the L2 cache: reads them once for maximum
//      and sum, then again (from L2) tile by tile beside the teacher's tile, for <q, x> and the gradient, which
//      bypasses the cache on its way out.                                             (2V + 2) e B K, and V e B K in L2
// The floor is (2V + 2) e B K. Exponentials per column of an image: student 2V, teacher 2 + 2 per group.
// What is summed in which order depends on K alone: the result's bits do not depend on the number of threads.
#include "cpu/dino_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

constexpr int64_t kTile = 1024;  // columns: three float tiles and a row's stay in the L1 cache (16 KB of 32 or 48)
constexpr int64_t kGroupBytes = 1280 << 10;  // a group's logits: what a 2 MB L2 cache holds beside the teacher's tiles
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct RowSum {  // of one row, or of a part of it
  float maximum = -kInfinity;
  double sum = 0.0;      // of e^((logit - maximum) / temperature)
  double product = 0.0;  // of the same times (logit - maximum) / temperature

  void rescale(float new_maximum, double inverse_temp) {
    if (sum == 0.0) {  // nothing yet: maximum may be -inf, and 0 * inf is not 0
      maximum = new_maximum;
      return;
    }
    const double shift = (static_cast<double>(maximum) - new_maximum) * inverse_temp, factor = std::exp(shift);
    product = factor * (product + sum * shift);
    sum *= factor;
    maximum = new_maximum;
  }
  void add(RowSum other, double inverse_temp) {
    const float larger = std::max(maximum, other.maximum);
    rescale(larger, inverse_temp);
    other.rescale(larger, inverse_temp);
    sum += other.sum;
    product += other.product;
  }
};

template <typename F> void by_type(LogitType type, F f) {
  switch (type) {
    case LogitType::float32: return f(float{});
    case LogitType::bfloat16: return f(bf16{});
    case LogitType::float16: return f(f16{});
  }
}

template <typename T> const T* row_of(const Logits& logits, int64_t crop, int64_t image) {
  return static_cast<const T*>(logits.data) + crop * logits.crop_stride + image * logits.image_stride;
}

// Calls body(k, load) for each vector of [0, n), where load(p, fill) reads the vector at p + k.
template <typename F> DINO_FAST_INLINE void for_vectors(int64_t n, F body) {
  int64_t k = 0;
  for (; k + Vec::width <= n; k += Vec::width) body(k, Vec::width);
  if (k < n) body(k, static_cast<int>(n - k));
}
template <typename T> DINO_FAST_INLINE Vec load_part(const T* p, int n, float fill) {
  return n == Vec::width ? load(p) : load_first(p, n, fill);
}
template <typename T> DINO_FAST_INLINE void store_part(T* p, int n, Vec x) {
  if (n == Vec::width) store(p, x); else store_first(p, n, x);
}

// --- pass 1: the teacher -------------------------------------------------------------------------------------------

// Columns [first, first + n) of every teacher row: their part of each row's sums, and the mean over rows.
template <typename T>
void teacher_chunk(const DinoLossProblem& p, int64_t first, int64_t n, RowSum* sums, int64_t sums_stride, float* mean) {
  const Vec inverse_temp(static_cast<float>(1.0 / p.teacher_temp));
  const float* center = p.center + first;
  for (int64_t k = 0; k < n; ++k) mean[first + k] = 0.0f;
  for (int64_t row = 0; row < 2 * p.B; ++row) {
    const T* t = row_of<T>(p.teacher, row / p.B, row % p.B) + first;
    const int64_t following = std::min(row + 1, 2 * p.B - 1);  // far away in memory: no hardware prefetcher finds it
    const T* next = row_of<T>(p.teacher, following / p.B, following % p.B) + first;
    Vec maximum(-kInfinity);
    for_vectors(n, [&](int64_t k, int part) {
      const Vec raw = load_part(t + k, part, 0.0f);
      const Vec centred = raw - load_part(center + k, part, kInfinity);
      maximum = max(centred, maximum);
      store_part(mean + first + k, part, load_part(mean + first + k, part, 0.0f) + raw);
    });
    RowSum result;
    result.maximum = reduce_max(maximum);
    const Vec m(result.maximum);
    Vec sum(0.0f), product(0.0f);
    for_vectors(n, [&](int64_t k, int part) {
      const Vec y = (load_part(t + k, part, 0.0f) - load_part(center + k, part, 0.0f) - m) * inverse_temp;
      __builtin_prefetch(next + k);
      Vec e = exp(y);
      if (part < Vec::width) e = load_first(reinterpret_cast<const float*>(&e), part, 0.0f);
      sum = sum + e;
      product = fma(e, y, product);
    });
    result.sum = reduce_add(sum);
    result.product = reduce_add(product);
    sums[row * sums_stride] = result;
  }
  const float scale = 1.0f / static_cast<float>(2 * p.B);
  for (int64_t k = 0; k < n; ++k) mean[first + k] *= scale;
}

void teacher_statistics(const DinoLossProblem& p, const DinoLossResult& r) {
  // The width depends on K alone. 64 columns are a cache line of any type; more chunks than threads even out the load.
  const int64_t width = std::min<int64_t>(kTile, (p.K / 32 + 64) / 64 * 64 + 64);
  const int64_t chunks = (p.K + width - 1) / width, rows = 2 * p.B;
  std::vector<RowSum> sums(rows * chunks);
  parallel_for(chunks, p.threads, [&](int64_t chunk) {
    const FlushSubnormals flush;
    const int64_t first = chunk * width, n = std::min(width, p.K - first);
    by_type(p.teacher.type, [&](auto type) {
      teacher_chunk<decltype(type)>(p, first, n, sums.data() + chunk, chunks, r.teacher_mean);
    });
  });
  double entropy = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    RowSum total = sums[row * chunks];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) total.add(sums[row * chunks + chunk], 1.0 / p.teacher_temp);
    r.row_statistics[row] = total.maximum;
    r.row_statistics[(2 + p.V) * p.B + row] = static_cast<float>(total.sum);
    entropy += std::log(total.sum) - total.product / total.sum;
  }
  *r.teacher_entropy = static_cast<float>(entropy / static_cast<double>(rows));
}

// --- pass 2: the student -------------------------------------------------------------------------------------------

// The maximum and sum of one row. Each tile is read twice, the second time from the L1 cache, so that one maximum
// serves the whole tile and each logit costs one exponential.
template <typename S> RowSum row_sum(const S* s, int64_t K, double inverse_temp) {
  const Vec inverse(static_cast<float>(inverse_temp));
  RowSum total;
  for (int64_t first = 0; first < K; first += kTile) {
    const int64_t n = std::min(kTile, K - first);
    const S* tile = s + first;
    Vec maximum(-kInfinity);
    for_vectors(n, [&](int64_t k, int part) { maximum = max(load_part(tile + k, part, -kInfinity), maximum); });
    const float m = reduce_max(maximum);
    if (m > total.maximum) total.rescale(m, inverse_temp);
    const Vec subtract(total.maximum);
    Vec sum(0.0f);
    for_vectors(n, [&](int64_t k, int part) {
      __builtin_prefetch(tile + k + 2 * kTile, 0, 2);  // into L2
      sum = sum + exp((load_part(tile + k, part, -kInfinity) - subtract) * inverse);
    });
    total.sum += reduce_add(sum);
  }
  return total;
}

struct Softmax {  // how to turn a row's logits into probabilities
  float maximum, inverse_temp, inverse_sum;
};

// p_u of one tile.
template <typename T>
void teacher_tile(const T* t, const float* center, int64_t n, const Softmax& softmax, float* probabilities) {
  const Vec m(softmax.maximum), inverse_temp(softmax.inverse_temp), inverse_sum(softmax.inverse_sum);
  for_vectors(n, [&](int64_t k, int part) {
    const Vec y = (load_part(t + k, part, 0.0f) - load_part(center + k, part, 0.0f) - m) * inverse_temp;
    store(probabilities + k, exp(y) * inverse_sum);
  });
}

// <q, x> of one tile of one row, and its gradient where one is wanted: e^x * exp_scale - q * target_scale.
template <bool kGradient, bool kStream, typename S>
double student_tile(const S* s, const float* q, int64_t n, const Softmax& softmax, float exp_scale, float target_scale,
                    S* gradient) {
  const Vec m(softmax.maximum), inverse_temp(softmax.inverse_temp), a(exp_scale), b(target_scale);
  Vec product(0.0f);
  for_vectors(n, [&](int64_t k, int part) {
    const Vec target = load_part(q + k, part, 0.0f);
    const Vec x = (load_part(s + k, part, softmax.maximum) - m) * inverse_temp;
    product = fma(target, x, product);
    if constexpr (kGradient) {
      const Vec g = fnma(target, b, exp(x) * a);
      if (kStream && part == Vec::width) stream(gradient + k, g); else store_part(gradient + k, part, g);
    }
  });
  return reduce_add(product);
}

// Student rows [v_first, v_last) of image b.
template <typename S> struct StudentGroup {
  const DinoLossProblem& p;
  int64_t b, v_first, v_last;
  const float* statistics;  // of every row
  double scale;             // upstream / (B N)
  S* gradient;              // [V, B, K] or null
  double* products;         // <q, x> of the group's rows

  float maximum(int64_t row) const { return statistics[row * p.B + b]; }
  float sum(int64_t row) const { return statistics[(2 + p.V + row) * p.B + b]; }
  Softmax softmax(int64_t row, double temp) const {
    return {maximum(row), static_cast<float>(1.0 / temp), 1.0f / sum(row)};
  }

  void run() const {
    alignas(64) float probabilities[2][kTile], q[kTile];
    for (int64_t first = 0; first < p.K; first += kTile) {
      const int64_t n = std::min(kTile, p.K - first);
      for (int u = 0; u < 2; ++u) {
        by_type(p.teacher.type, [&](auto type) {
          const auto* t = row_of<decltype(type)>(p.teacher, u, b) + first;
          teacher_tile(t, p.center + first, n, softmax(u, p.teacher_temp), probabilities[u]);
        });
      }
      float a0 = 0.0f, a1 = 0.0f;  // the weights that q was made with
      for (int64_t v = v_first; v < v_last; ++v) {
        if (v == v_first || a0 != p.pair_weights[v] || a1 != p.pair_weights[p.V + v]) {
          a0 = p.pair_weights[v];
          a1 = p.pair_weights[p.V + v];
          for (int64_t k = 0; k < n; k += Vec::width) {
            store(q + k, fma(Vec(a0), load(probabilities[0] + k), Vec(a1) * load(probabilities[1] + k)));
          }
        }
        tile_of_row(v, first, n, q, a0 + a1);
      }
    }
    stream_fence();
  }

  void tile_of_row(int64_t v, int64_t first, int64_t n, const float* q, float weight) const {
    const S* s = row_of<S>(p.student, v, b) + first;
    const Softmax soft = softmax(2 + v, p.student_temp);
    const float target_scale = static_cast<float>(scale / p.student_temp);
    const float exp_scale = static_cast<float>(scale / p.student_temp * weight / sum(2 + v));
    double product;
    if (gradient == nullptr) {
      product = student_tile<false, false>(s, q, n, soft, exp_scale, target_scale, static_cast<S*>(nullptr));
    } else {
      S* g = gradient + (v * p.B + b) * p.K + first;
      const bool aligned = reinterpret_cast<uintptr_t>(g) % (Vec::width * sizeof(S)) == 0;
      product = aligned ? student_tile<true, true>(s, q, n, soft, exp_scale, target_scale, g)
                        : student_tile<true, false>(s, q, n, soft, exp_scale, target_scale, g);
    }
    products[v - v_first] += product;
  }
};

double sum_of_pairs(const DinoLossProblem& p) {
  double N = 0.0;
  for (int64_t i = 0; i < 2 * p.V; ++i) N += p.pair_weights[i];
  return N;
}

int64_t rows_in_group(const DinoLossProblem& p) {
  const int64_t row_bytes = p.K * (p.student.type == LogitType::float32 ? 4 : 2);
  const int64_t most = std::max<int64_t>(1, std::min(p.V, kGroupBytes / std::max<int64_t>(1, row_bytes)));
  const int64_t groups = (p.V + most - 1) / most;
  return (p.V + groups - 1) / groups;  // even groups
}

}  // namespace

void dino_loss_forward(const DinoLossProblem& p, const DinoLossResult& r) {
  teacher_statistics(p, r);
  const int64_t group = rows_in_group(p), groups = (p.V + group - 1) / group;
  const double pairs = static_cast<double>(p.B) * sum_of_pairs(p);
  std::vector<double> products(p.V * p.B, 0.0);  // [B, V]
  float* maxima = r.row_statistics + 2 * p.B;
  float* sums = maxima + (2 + p.V) * p.B;
  parallel_for(p.B * groups, p.threads, [&](int64_t task) {
    const FlushSubnormals flush;
    const int64_t b = task / groups, v_first = task % groups * group, v_last = std::min(p.V, v_first + group);
    by_type(p.student.type, [&](auto type) {
      using S = decltype(type);
      for (int64_t v = v_first; v < v_last; ++v) {
        const RowSum row = row_sum(row_of<S>(p.student, v, b), p.K, 1.0 / p.student_temp);
        maxima[v * p.B + b] = row.maximum;
        sums[v * p.B + b] = static_cast<float>(row.sum);
      }
      StudentGroup<S>{p, b, v_first, v_last, r.row_statistics, 1.0 / pairs, static_cast<S*>(r.gradient),
                      products.data() + b * p.V + v_first}
          .run();
    });
  });
  double loss = 0.0;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t v = 0; v < p.V; ++v) {
      const double weight = static_cast<double>(p.pair_weights[v]) + p.pair_weights[p.V + v];
      loss += weight * std::log(static_cast<double>(sums[v * p.B + b])) - products[b * p.V + v];
    }
  }
  *r.loss = static_cast<float>(loss / pairs);
}

void dino_loss_gradient(const DinoLossProblem& p, const float* row_statistics, double upstream, void* gradient) {
  const int64_t group = rows_in_group(p), groups = (p.V + group - 1) / group;
  const double scale = upstream / (static_cast<double>(p.B) * sum_of_pairs(p));
  parallel_for(p.B * groups, p.threads, [&](int64_t task) {
    const FlushSubnormals flush;
    const int64_t b = task / groups, v_first = task % groups * group, v_last = std::min(p.V, v_first + group);
    std::vector<double> products(v_last - v_first, 0.0);
    by_type(p.student.type, [&](auto type) {
      using S = decltype(type);
      StudentGroup<S>{p, b, v_first, v_last, row_statistics, scale, static_cast<S*>(gradient), products.data()}.run();
    });
  });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
