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
//   2. `StudentRows`    takes groups of one image's student rows that fit the L2 cache. In one sweep over K it reads a
//      group for maxima and sums, and beside it, tile by tile, writes the group before, whose sums are known: its logits
//      again (from L2), the teacher's tile, <q, x>, and the gradient, which bypasses the cache. A copy is what this sweep
//      looks like to the memory, both directions at once, with the arithmetic hidden under it.
//                                                                                     (2V + 2) e B K, and V e B K in L2
// The floor is (2V + 2) e B K. Exponentials per column of an image: student 2V, teacher 2 + 2 per group.
// What is summed in which order depends on K alone: the result's bits do not depend on the number of threads.
#include "cpu/dino_loss.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

constexpr int64_t kTile = 1024;  // columns: some five float tiles are in use at a time, in an L1 cache of 32 or 48 KB
constexpr int64_t kMostRows = 16;            // in a group: more rows share the work on a tile of the teacher,
constexpr int64_t kGroupBytes = 1280 << 10;  // but their logits should stay in an L2 cache of 2 MB until they are written
constexpr int64_t kTasksPerThread = 2;       // evens out the load; a task's first group has no other to be read beside
constexpr int64_t kAhead = 512;  // columns from a prefetch to its use: hardware prefetchers stop at the end of a page
constexpr double kLn2 = 0.693147180559945309;
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
};

// What differences of logits are multiplied with, so that exp2 gives e^(difference / temperature).
float base_2(double temperature) { return static_cast<float>(1.0 / (temperature * kLn2)); }

template <typename F> void dispatch_type(LogitType type, F f) {
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
  const Vec inverse_temp(base_2(p.teacher_temp));
  const float* center = p.center + first;
  for (int64_t k = 0; k < n; ++k) mean[first + k] = 0.0f;
  for (int64_t row = 0; row < 2 * p.B; ++row) {
    const T* t = row_of<T>(p.teacher, row / p.B, row % p.B) + first;
    const int64_t following = std::min(row + 1, 2 * p.B - 1);  // far away in memory: no hardware prefetcher finds it
    const T* next = row_of<T>(p.teacher, following / p.B, following % p.B) + first;
    Vec maximum(-kInfinity);
    for_vectors(n, [&](int64_t k, int part) {
      __builtin_prefetch(k + kAhead < n ? t + k + kAhead : next + k + kAhead - n);
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
      Vec e = exp2(y);
      if (part < Vec::width) e = load_first(reinterpret_cast<const float*>(&e), part, 0.0f);
      sum = sum + e;
      product = fma(e, y, product);
    });
    result.sum = reduce_add(sum);
    result.product = kLn2 * reduce_add(product);
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
    dispatch_type(p.teacher.type, [&](auto type) {
      teacher_chunk<decltype(type)>(p, first, n, sums.data() + chunk, chunks, r.teacher_mean);
    });
  });
  std::vector<double> entropies(rows);
  parallel_for(rows, p.threads, [&](int64_t row) {
    const RowSum* parts = sums.data() + row * chunks;
    RowSum total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total.maximum = std::max(total.maximum, parts[chunk].maximum);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      RowSum part = parts[chunk];
      part.rescale(total.maximum, 1.0 / p.teacher_temp);
      total.sum += part.sum;
      total.product += part.product;
    }
    r.row_statistics[row] = total.maximum;
    r.row_statistics[(2 + p.V) * p.B + row] = static_cast<float>(total.sum);
    entropies[row] = std::log(total.sum) - total.product / total.sum;
  });
  const double entropy = std::accumulate(entropies.begin(), entropies.end(), 0.0);
  *r.teacher_entropy = static_cast<float>(entropy / static_cast<double>(rows));
}

// --- pass 2: the student -------------------------------------------------------------------------------------------

struct Softmax {  // how to turn a row's logits into probabilities
  float maximum, inverse_temp, inverse_sum;
};

// p_u of one tile.
template <typename T>
void teacher_tile(const T* t, const float* center, int64_t n, const Softmax& softmax, float* probabilities) {
  const Vec m(softmax.maximum), inverse_temp(softmax.inverse_temp), inverse_sum(softmax.inverse_sum);
  for_vectors(n, [&](int64_t k, int part) {
    const Vec y = (load_part(t + k, part, 0.0f) - load_part(center + k, part, 0.0f) - m) * inverse_temp;
    __builtin_prefetch(t + k + kAhead);
    store(probabilities + k, exp2(y) * inverse_sum);
  });
}

// The maximum of one tile of a row.
template <typename S> float tile_maximum(const S* s, int64_t n) {
  Vec maximum(-kInfinity);
  for_vectors(n, [&](int64_t k, int part) {
    __builtin_prefetch(s + k + kAhead);
    maximum = max(load_part(s + k, part, -kInfinity), maximum);
  });
  return reduce_max(maximum);
}

// One tile of a row that is read: the sum of its exponentials, and the maximum of the tile after it.
template <typename S> struct ReadTile {
  const S* s;
  const S* following;
  float maximum, inverse_temp;
  float sum, following_maximum;  // results
};

// One tile of a row whose sums are known: <q, s - max s>, and its gradient, e^x * exp_scale - q * target_scale.
template <typename S> struct WriteTile {
  const S* s;
  const float* q;
  float maximum, inverse_temp, exp_scale, target_scale;
  S* gradient;
  float product;  // result
};

enum class Write { nothing, product, gradient, streamed_gradient };

// Reads a tile of one row and, vector by vector beside it, writes a tile of another.
template <bool kRead, Write kWrite, typename S> void tile_pass(int64_t n, ReadTile<S>& read, WriteTile<S>& write) {
  const Vec read_maximum(read.maximum), read_inverse(read.inverse_temp);
  const Vec write_maximum(write.maximum), write_inverse(write.inverse_temp), a(write.exp_scale), b(write.target_scale);
  Vec sum(0.0f), following(-kInfinity), product(0.0f);
  for_vectors(n, [&](int64_t k, int part) {
    if constexpr (kRead) {
      __builtin_prefetch(read.following + k + kAhead);
      following = max(load_part(read.following + k, part, -kInfinity), following);
      sum = sum + exp2((load_part(read.s + k, part, -kInfinity) - read_maximum) * read_inverse);
    }
    if constexpr (kWrite != Write::nothing) {
      const Vec q = load_part(write.q + k, part, 0.0f);
      const Vec difference = load_part(write.s + k, part, write.maximum) - write_maximum;
      product = fma(q, difference, product);
      if constexpr (kWrite != Write::product) {
        const Vec g = fnma(q, b, exp2(difference * write_inverse) * a);
        const bool streams = kWrite == Write::streamed_gradient && part == Vec::width;
        if (streams) stream(write.gradient + k, g); else store_part(write.gradient + k, part, g);
      }
    }
  });
  read.sum = reduce_add(sum);
  read.following_maximum = reduce_max(following);
  write.product = reduce_add(product);
}

template <typename S> struct Group {  // of rows of one image
  int64_t b = 0, first = 0, n = 0;
  RowSum sums[kMostRows];
  float tile_maximum[kMostRows];  // of the tile that is next to be read
};

// The student rows [first, last) of the list that has the crops of image 0, then those of image 1, ...
template <typename S> struct StudentRows {
  const DinoLossProblem& p;
  int64_t group_rows;
  float* statistics;  // of every row
  double scale;       // upstream / (B N)
  S* gradient;        // [V, B, K] or null
  double* products;   // [B, V], <q, x>
  bool known;         // statistics has the student's rows already

  float& maximum(const Group<S>& group, int64_t i) const { return statistics[(2 + group.first + i) * p.B + group.b]; }
  float& sum(const Group<S>& group, int64_t i) const {
    return statistics[(2 + p.V + 2 + group.first + i) * p.B + group.b];
  }

  void run(int64_t first, int64_t last) const {
    Group<S> written, read;
    for (int64_t row = first; row < last || written.n > 0;) {
      read = Group<S>{};
      read.b = row / p.V;
      read.first = row % p.V;
      read.n = std::min({group_rows, p.V - read.first, last - row});
      row += read.n;
      if (!known || written.n > 0) pass(written, read);
      if (!known) {
        for (int64_t i = 0; i < read.n; ++i) {
          maximum(read, i) = read.sums[i].maximum;
          sum(read, i) = static_cast<float>(read.sums[i].sum);
        }
      }
      written = read;
    }
    stream_fence();
  }

  void pass(const Group<S>& written, Group<S>& read) const {
    alignas(64) float probabilities[2][kTile], weighted[kTile];
    for (int64_t first = 0; first < p.K; first += kTile) {
      const int64_t n = std::min(kTile, p.K - first);
      if (written.n > 0) teacher_tiles(written.b, first, n, probabilities);
      const float* q = nullptr;
      for (int64_t i = 0; i < std::max(written.n, read.n); ++i) {
        ReadTile<S> reading{};
        WriteTile<S> writing{};
        const bool reads = !known && i < read.n, writes = i < written.n;
        if (reads) reading = read_tile(read, i, first, n);
        if (writes) {
          const int64_t v = written.first + i;
          const float a0 = p.pair_weights[v], a1 = p.pair_weights[p.V + v];
          const bool same = i > 0 && a0 == p.pair_weights[v - 1] && a1 == p.pair_weights[p.V + v - 1];
          if (!same) q = target(probabilities, a0, a1, n, weighted);
          writing = write_tile(written, i, first, q, a0 + a1);
        }
        const bool in_place = writing.gradient == writing.s;  // in the cache already
        const bool streams = !in_place && reinterpret_cast<uintptr_t>(writing.gradient) % (Vec::width * sizeof(S)) == 0;
        const Write mode = !writes ? Write::nothing : gradient == nullptr ? Write::product
                           : streams ? Write::streamed_gradient : Write::gradient;
        if (reads) dispatch_mode<true>(mode, n, reading, writing); else dispatch_mode<false>(mode, n, reading, writing);
        if (reads) {
          const int64_t left = p.K - first - n;
          read.sums[i].sum += reading.sum;
          read.tile_maximum[i] = left >= kTile ? reading.following_maximum : tile_maximum(reading.s + n, left);
        }
        if (writes) products[written.b * p.V + written.first + i] += writing.product / p.student_temp;
      }
    }
  }

  // q of one tile: a row of the probabilities, where the pair's weights pick one, or computed into `weighted`.
  static const float* target(const float (*probabilities)[kTile], float a0, float a1, int64_t n, float* weighted) {
    if (a0 == 0.0f && a1 == 1.0f) return probabilities[1];
    if (a0 == 1.0f && a1 == 0.0f) return probabilities[0];
    for (int64_t k = 0; k < n; k += Vec::width) {
      store(weighted + k, fma(Vec(a0), load(probabilities[0] + k), Vec(a1) * load(probabilities[1] + k)));
    }
    return weighted;
  }

  template <bool kRead> static void dispatch_mode(Write mode, int64_t n, ReadTile<S>& read, WriteTile<S>& write) {
    switch (mode) {
      case Write::nothing: return tile_pass<kRead, Write::nothing>(n, read, write);
      case Write::product: return tile_pass<kRead, Write::product>(n, read, write);
      case Write::gradient: return tile_pass<kRead, Write::gradient>(n, read, write);
      case Write::streamed_gradient: return tile_pass<kRead, Write::streamed_gradient>(n, read, write);
    }
  }

  void teacher_tiles(int64_t b, int64_t first, int64_t n, float (*probabilities)[kTile]) const {
    for (int64_t u = 0; u < 2; ++u) {
      const Softmax soft{statistics[u * p.B + b], base_2(p.teacher_temp), 1.0f / statistics[(2 + p.V + u) * p.B + b]};
      dispatch_type(p.teacher.type, [&](auto type) {
        teacher_tile(row_of<decltype(type)>(p.teacher, u, b) + first, p.center + first, n, soft, probabilities[u]);
      });
    }
  }

  ReadTile<S> read_tile(Group<S>& group, int64_t i, int64_t first, int64_t n) const {
    const S* s = row_of<S>(p.student, group.first + i, group.b) + first;
    RowSum& total = group.sums[i];
    const float maximum = first == 0 ? tile_maximum(s, n) : group.tile_maximum[i];
    if (maximum > total.maximum) total.rescale(maximum, 1.0 / p.student_temp);
    const S* following = first + n + kTile <= p.K ? s + n : s;  // a shorter tile gets a loop of its own
    return {s, following, total.maximum, base_2(p.student_temp), 0.0f, 0.0f};
  }

  WriteTile<S> write_tile(const Group<S>& group, int64_t i, int64_t first, const float* q, float weight) const {
    const int64_t v = group.first + i;
    WriteTile<S> tile{};
    tile.s = row_of<S>(p.student, v, group.b) + first;
    tile.q = q;
    tile.maximum = maximum(group, i);
    tile.inverse_temp = base_2(p.student_temp);
    tile.exp_scale = static_cast<float>(scale / p.student_temp * weight / sum(group, i));
    tile.target_scale = static_cast<float>(scale / p.student_temp);
    if (gradient != nullptr) tile.gradient = gradient + (v * p.B + group.b) * p.K + first;
    return tile;
  }
};

double sum_of_pairs(const DinoLossProblem& p) {
  double N = 0.0;
  for (int64_t i = 0; i < 2 * p.V; ++i) N += p.pair_weights[i];
  return N;
}

int64_t rows_in_group(const DinoLossProblem& p) {
  const int64_t row_bytes = p.K * (p.student.type == LogitType::float32 ? 4 : 2);
  const int64_t most = std::clamp<int64_t>(kGroupBytes / row_bytes, 1, std::min(p.V, kMostRows));
  const int64_t groups = (p.V + most - 1) / most;
  return (p.V + groups - 1) / groups;  // even groups
}

template <typename S>
void student(const DinoLossProblem& p, float* statistics, double scale, void* gradient, double* products, bool known) {
  const StudentRows<S> rows{p, rows_in_group(p), statistics, scale, static_cast<S*>(gradient), products, known};
  const int64_t all = p.B * p.V, groups = p.B * ((p.V + rows.group_rows - 1) / rows.group_rows);
  const int64_t tasks = std::min<int64_t>(groups, kTasksPerThread * p.threads);
  parallel_for(tasks, p.threads, [&](int64_t task) {
    const FlushSubnormals flush;
    rows.run(all * task / tasks, all * (task + 1) / tasks);
  });
}

}  // namespace

void dino_loss_forward(const DinoLossProblem& p, const DinoLossResult& r) {
  teacher_statistics(p, r);
  const double pairs = static_cast<double>(p.B) * sum_of_pairs(p);
  std::vector<double> products(p.V * p.B, 0.0);  // [B, V]
  dispatch_type(p.student.type, [&](auto type) {
    student<decltype(type)>(p, r.row_statistics, 1.0 / pairs, r.gradient, products.data(), false);
  });
  const float* sums = r.row_statistics + (2 + p.V + 2) * p.B;
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
  std::vector<double> products(p.V * p.B, 0.0);
  const double scale = upstream / (static_cast<double>(p.B) * sum_of_pairs(p));
  dispatch_type(p.student.type, [&](auto type) {
    student<decltype(type)>(p, const_cast<float*>(row_statistics), scale, gradient, products.data(), true);
  });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
