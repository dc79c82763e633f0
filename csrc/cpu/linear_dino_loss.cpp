// What the loss without logits does to a tile of logits between two matrix products: a softmax whose maximum and sum
// are carried from tile to tile, and the same exponentials once both are known. A task takes one row; nothing depends on
// which thread runs it. The tile is in the L2 or L3 cache: three passes in `attend`, the last two from L1, one in `weigh`.
#include "cpu/linear_dino_loss.h"

#include <limits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsOfTask = 8;  // a row takes a fraction of a microsecond to a few, handing out a task about one

// Calls body(k, count) for each vector of [0, n); count is the vector's width, or less at the end.
template <typename F> DINO_FAST_INLINE void for_vectors(int64_t n, F body) {
  int64_t k = 0;
  for (; k + Vec::width <= n; k += Vec::width) body(k, Vec::width);
  if (k < n) body(k, static_cast<int>(n - k));
}
DINO_FAST_INLINE Vec load_part(const float* p, int n, float fill) {
  return n == Vec::width ? load(p) : load_first(p, n, fill);
}
DINO_FAST_INLINE void store_part(float* p, int n, Vec x) {
  if (n == Vec::width) store(p, x); else store_first(p, n, x);
}

// x = scale logit - center of the vector at k.
DINO_FAST_INLINE Vec logit_at(const LogitTile& tile, const float* x, int64_t k, int part) {
  Vec logit = load_part(x + k, part, -kInfinity);
  if (tile.scale != nullptr) logit = logit * load_part(tile.scale + k, part, 1.0f);
  if (tile.center != nullptr) logit = logit - load_part(tile.center + k, part, 0.0f);
  return logit;
}

void attend_row(const LogitTile& tile, float* x, const float* value_scale, float& row_maximum, float& row_sum, float* read,
                int64_t width) {
  const float inverse_temp = static_cast<float>(tile.inverse_temp);
  Vec maximum(-kInfinity);
  for_vectors(tile.columns, [&](int64_t k, int part) {
    const Vec logit = logit_at(tile, x, k, part);
    store_part(x + k, part, logit);
    maximum = max(logit, maximum);
  });
  const float tile_maximum = reduce_max(maximum);
  if (tile_maximum > row_maximum) {
    if (row_sum != 0.0f) {
      const float scale = std::exp((row_maximum - tile_maximum) * inverse_temp);
      row_sum *= scale;
      if (read != nullptr) {
        for (int64_t i = 0; i < width; ++i) read[i] *= scale;
      }
    }
    row_maximum = tile_maximum;
  }
  const Vec m(row_maximum), inverse(inverse_temp);
  Vec sum(0.0f);
  for_vectors(tile.columns, [&](int64_t k, int part) {
    const Vec e = exp((load_part(x + k, part, -kInfinity) - m) * inverse);
    sum = sum + e;
    store_part(x + k, part, value_scale == nullptr ? e : e * load_part(value_scale + k, part, 0.0f));
  });
  row_sum += reduce_add(sum);
}

void weigh_row(const LogitTile& tile, float* x, float row_maximum, float row_factor) {
  const Vec m(row_maximum), inverse(static_cast<float>(tile.inverse_temp)), factor(row_factor);
  for_vectors(tile.columns, [&](int64_t k, int part) {
    store_part(x + k, part, exp((logit_at(tile, x, k, part) - m) * inverse) * factor);
  });
}

DINO_FAST_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec sum(0.0f);
  for_vectors(n, [&](int64_t i, int part) { sum = fma(load_part(a + i, part, 0.0f), load_part(b + i, part, 0.0f), sum); });
  return reduce_add(sum);
}

void project_row(float* gradient, const float* weight, float gain, float& gain_gradient, int64_t width) {
  const float length = std::sqrt(dot(weight, weight, width));
  gain_gradient = dot(gradient, weight, width) / length;
  const Vec scale(gain / length), along(gain_gradient / length);
  for_vectors(width, [&](int64_t i, int part) {
    const Vec across = fnma(along, load_part(weight + i, part, 0.0f), load_part(gradient + i, part, 0.0f));
    store_part(gradient + i, part, across * scale);
  });
}

// body(row) for each of n rows, kRowsOfTask at a time.
template <typename F> void for_rows(int64_t n, int threads, F body) {
  parallel_for((n + kRowsOfTask - 1) / kRowsOfTask, threads, [&](int64_t task) {
    const FlushSubnormals flush;
    const int64_t last = n < (task + 1) * kRowsOfTask ? n : (task + 1) * kRowsOfTask;
    for (int64_t row = task * kRowsOfTask; row < last; ++row) body(row);
  });
}

}  // namespace

void linear_dino_loss_attend(const LogitTile& tile, const float* value_scale, float* maxima, float* sums, float* read,
                             int64_t width, int threads) {
  for_rows(tile.rows, threads, [&](int64_t row) {
    float* own = read == nullptr ? nullptr : read + row * width;
    attend_row(tile, tile.logits + row * tile.columns, value_scale, maxima[row], sums[row], own, width);
  });
}

void linear_dino_loss_weigh(const LogitTile& tile, const float* maxima, const float* factors, int threads) {
  for_rows(tile.rows, threads, [&](int64_t row) {
    weigh_row(tile, tile.logits + row * tile.columns, maxima[row], factors[row]);
  });
}

void linear_dino_loss_scale(const float* weight, const float* gain, float* scale, int64_t n, int64_t width, int threads) {
  for_rows(n, threads, [&](int64_t k) {
    scale[k] = gain[k] / std::sqrt(dot(weight + k * width, weight + k * width, width));
  });
}

void linear_dino_loss_project(float* gradient, const float* weight, const float* gain, float* gain_gradient, int64_t n,
                              int64_t width, int threads) {
  for_rows(n, threads, [&](int64_t k) {
    project_row(gradient + k * width, weight + k * width, gain[k], gain_gradient[k], width);
  });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
