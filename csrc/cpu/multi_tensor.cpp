// multi_tensor on the CPU: EMA, gradient norms, and AdamW with EMA and bfloat16 copies, each one pass over all tensors.
//
// Tensors are cut into pieces and the pieces packed into tasks of about equal size, so that one 67 MB matrix and a
// hundred 1.5 kB vectors both spread over the threads. A piece's results depend on the piece alone, and partial
// sums are added in the order of the pieces: the same inputs give the same bits with any number of threads.
//
// Bytes a parameter, float32: EMA 12 (read t, p, write t); norms 4; AdamW with EMA 36 (read g, p, m1, m2, t, write
// p, m1, m2, t), plus 2 for each copy. Every line that is written was read just before, so it is already in the cache
// and non-temporal stores would save nothing: they would only throw that line out.
#include "cpu/multi_tensor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

// Elements of a task. The longer a stream, the fewer starts of one, at which memory is waited for: norms of 176 MB take
// 6.1 ms in tasks of 16384 and 5.5 ms in tasks of 65536 (100 us of AdamW with EMA); shorter where there are few of them.
int64_t task_size(int64_t total) { return std::clamp<int64_t>(total / 256, 16384, 65536); }

// Bytes from a prefetch to its use. Into the second-level cache, on top of the hardware's prefetchers, whose reach ends
// with a page: AdamW with EMA on 44 M parameters takes 32.5 ms without and 28.9 ms with them.
constexpr int kAhead = 512;
template <int Ahead = kAhead, typename T> DINO_FAST_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + Ahead, 0, 2);
}

struct Piece {
  int64_t row, begin, size;
};

struct Tasks {
  std::vector<Piece> pieces;
  std::vector<int64_t> first;  // task k is pieces[first[k]] up to pieces[first[k + 1]]
};

template <typename Row>
Tasks cut(const Row* rows, int64_t n) {
  Tasks tasks;
  int64_t total = 0, room = 0;
  for (int64_t row = 0; row < n; ++row) total += rows[row].numel;
  const int64_t limit = task_size(total);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t begin = 0; begin < rows[row].numel; begin += limit) {
      const int64_t size = std::min(limit, rows[row].numel - begin);
      if (size > room) {
        tasks.first.push_back(static_cast<int64_t>(tasks.pieces.size()));
        room = limit;
      }
      room -= size;
      tasks.pieces.push_back({row, begin, size});
    }
  }
  tasks.first.push_back(static_cast<int64_t>(tasks.pieces.size()));
  return tasks;
}

template <typename Body>
void for_each_piece(const Tasks& tasks, int threads, const Body& body) {
  parallel_for(static_cast<int64_t>(tasks.first.size()) - 1, threads, [&](int64_t task) {
    for (int64_t i = tasks.first[task]; i < tasks.first[task + 1]; ++i) body(tasks.pieces[i], i);
  });
}

// Calls body with a null pointer of the element type.
template <typename Body>
DINO_FAST_INLINE void with_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::float32) body(static_cast<float*>(nullptr));
  else if (dtype == Dtype::bfloat16) body(static_cast<bf16*>(nullptr));
  else body(static_cast<f16*>(nullptr));
}

// Loads and stores of a whole vector, and of the first n elements of one, under the same names.
struct Whole {
  template <typename T> DINO_FAST_INLINE Vec get(const T* p) const { return load(p); }
  template <typename T> DINO_FAST_INLINE void put(T* p, Vec x) const { store(p, x); }
};
struct First {
  int n;
  template <typename T> DINO_FAST_INLINE Vec get(const T* p) const { return load_first(p, n, 0.0f); }
  template <typename T> DINO_FAST_INLINE void put(T* p, Vec x) const { store_first(p, n, x); }
};

template <typename Body>
DINO_FAST_INLINE void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::width <= size; i += Vec::width) body(i, Whole{});
  if (i < size) body(i, First{static_cast<int>(size - i)});
}

// Where a loop reads one or two arrays, four parts of each are read side by side, so that more of the processor's own
// prefetchers run: norms of 176 MB take 7.3 ms on two cores, 7.8 ms front to back (Xeon; EPYC of Zen 4: 5.6 and 6.0).
// Where one of them is written as well it depends on the processor. The EMA of as much takes a Xeon 13.2 ms side by side
// and 14.1 front to back; a Zen 4 12.2 and, prefetching 2048 bytes ahead instead of 512, 11.3 (one core: 16.9 and 14.7).
constexpr int kSideBySide = 4;
template <typename Body>
DINO_FAST_INLINE void for_each_vector_side_by_side(int64_t size, const Body& body) {
  const int64_t part = size / (kSideBySide * Vec::width) * Vec::width;
  for (int64_t i = 0; i < part; i += Vec::width) {
    for (int k = 0; k < kSideBySide; ++k) body(k * part + i, k, Whole{});
  }
  const int64_t rest = kSideBySide * part;
  for_each_vector(size - rest, [&](int64_t i, auto whole) { body(rest + i, 0, whole); });
}

bool writes_best_front_to_back() {
#if defined(__x86_64__)
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return amd;
#else
  return false;
#endif
}

template <int Ahead, typename T, typename S>
DINO_FAST_INLINE auto ema_of(const EmaScalars& scalars, T* t, const S* s, bf16* copy) {
  return [=, &scalars](int64_t i, auto part) {
    prefetch<Ahead>(t + i);
    prefetch<Ahead>(s + i);
    const Vec mean = ema_element(scalars, part.get(t + i), part.get(s + i));
    part.put(t + i, mean);
    if (copy) part.put(copy + i, mean);
  };
}

template <typename T, typename S>
void ema_piece(const EmaScalars& scalars, int64_t size, T* t, const S* s, bf16* copy) {
  if (writes_best_front_to_back()) return for_each_vector(size, ema_of<4 * kAhead>(scalars, t, s, copy));
  const auto body = ema_of<kAhead>(scalars, t, s, copy);
  for_each_vector_side_by_side(size, [&](int64_t i, int, auto part) { body(i, part); });
}

template <typename G>
double sum_of_squares(int64_t size, const G* g) {
  Vec sums[kSideBySide] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  for_each_vector_side_by_side(size, [&](int64_t i, int k, auto part) {
    prefetch(g + i);
    const Vec x = part.get(g + i);
    sums[k] = fma(x, x, sums[k]);
  });
  return static_cast<double>(reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// The branches on the optional tensors are the same for a whole piece; the loop waits for memory, not for them.
template <typename G>
void adamw_piece(const AdamWScalars& scalars, const EmaScalars& ema, int64_t size, const G* g, float* p, float* m1,
                 float* m2, float* t, bf16* p_copy, bf16* t_copy) {
  for_each_vector(size, [&](int64_t i, auto part) {
    prefetch(g + i);
    prefetch(p + i);
    prefetch(m1 + i);
    prefetch(m2 + i);
    if (t) prefetch(t + i);
    Vec vp = part.get(p + i), vm1 = part.get(m1 + i), vm2 = part.get(m2 + i);
    adamw_element(scalars, part.get(g + i), vp, vm1, vm2);
    part.put(p + i, vp);
    part.put(m1 + i, vm1);
    part.put(m2 + i, vm2);
    if (p_copy) part.put(p_copy + i, vp);
    if (t) {
      const Vec vt = ema_element(ema, part.get(t + i), vp);
      part.put(t + i, vt);
      if (t_copy) part.put(t_copy + i, vt);
    }
  });
}

// The part of a step that an overflow of the gradients leaves: EMA and copies.
void skipped_piece(const EmaScalars& ema, int64_t size, const float* p, float* t, bf16* p_copy, bf16* t_copy) {
  for_each_vector(size, [&](int64_t i, auto part) {
    const Vec vp = part.get(p + i);
    if (p_copy) part.put(p_copy + i, vp);
    if (t) {
      const Vec vt = ema_element(ema, part.get(t + i), vp);
      part.put(t + i, vt);
      if (t_copy) part.put(t_copy + i, vt);
    }
  });
}

template <typename T> DINO_FAST_INLINE T* at(void* p, int64_t i) { return p ? static_cast<T*>(p) + i : nullptr; }

}  // namespace

void ema_update(const EmaRow* rows, int64_t n, double momentum, int threads) {
  const EmaScalars scalars = ema_scalars(momentum);
  for_each_piece(cut(rows, n), threads, [&](const Piece& piece, int64_t) {
    const EmaRow& row = rows[piece.row];
    with_type(row.teacher_dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      with_type(row.student_dtype, [&](auto* s) {
        using S = std::remove_pointer_t<decltype(s)>;
        ema_piece<T, S>(scalars, piece.size, at<T>(row.teacher, piece.begin),
                        static_cast<const S*>(row.student) + piece.begin, at<bf16>(row.copy, piece.begin));
      });
    });
  });
}

void grad_norms(const NormRow* rows, int64_t n, float* norms, int threads) {
  const Tasks tasks = cut(rows, n);
  std::vector<double> partial(tasks.pieces.size());
  for_each_piece(tasks, threads, [&](const Piece& piece, int64_t i) {
    const NormRow& row = rows[piece.row];
    with_type(row.gradient_dtype, [&](auto* g) {
      using G = std::remove_pointer_t<decltype(g)>;
      partial[i] = sum_of_squares(piece.size, static_cast<const G*>(row.gradient) + piece.begin);
    });
  });
  std::vector<double> sums(n, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) sums[tasks.pieces[i].row] += partial[i];
  for (int64_t row = 0; row < n; ++row) norms[row] = static_cast<float>(std::sqrt(sums[row]));
}

void adamw_ema(const AdamWRow* rows, int64_t n, AdamWOptions options, int threads) {
  const EmaScalars ema = ema_scalars(options.momentum);
  std::vector<AdamWScalars> scalars(n);
  for (int64_t i = 0; i < n; ++i) {
    scalars[i] = adamw_scalars(static_cast<double>(*rows[i].step) + 1.0, rows[i].lr, rows[i].weight_decay,
                               options.beta1, options.beta2, options.eps, rows[i].multiplier);
  }
  for_each_piece(cut(rows, n), threads, [&](const Piece& piece, int64_t) {
    const AdamWRow& row = rows[piece.row];
    const int64_t begin = piece.begin;
    float* t = at<float>(row.teacher, begin);
    bf16 *p_copy = at<bf16>(row.param_copy, begin), *t_copy = at<bf16>(row.teacher_copy, begin);
    if (options.skip) return skipped_piece(ema, piece.size, row.param + begin, t, p_copy, t_copy);
    with_type(row.gradient_dtype, [&](auto* g) {
      using G = std::remove_pointer_t<decltype(g)>;
      adamw_piece<G>(scalars[piece.row], ema, piece.size, static_cast<const G*>(row.gradient) + begin,
                     row.param + begin, row.exp_avg + begin, row.exp_avg_sq + begin, t, p_copy, t_copy);
    });
  });
  if (options.skip) return;
  for (int64_t i = 0; i < n; ++i) *rows[i].step += 1.0f;
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
