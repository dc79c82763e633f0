// The passes of the loss without logits over a tile of logits between two matrix products: a softmax whose maximum and
// sum are carried from tile to tile, with the sum of the teacher's weights times the student's logits; and the same
// exponentials once all are known. A task takes whole images, so that a teacher's row is in the L1 cache for all its
// students; nothing depends on which thread runs it. The tile comes from the L2 or L3 cache once in each function.
#include "cpu/linear_dino_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

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

// The vector's sum, rounded once where it is used: a softmax of almost one weight is 1 plus little.
DINO_FAST_INLINE double wide_sum(Vec x) {
  float lanes[Vec::width];
  store(lanes, x);
  double sum = 0.0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// One network's rows: logits x, less the centre where there is one.
struct Layer {
  const float* center;
  float inverse_temp;

  // Beyond the end of a row: `fill`.
  DINO_FAST_INLINE Vec at(const float* row, int64_t k, int part, float fill) const {
    const Vec x = load_part(row + k, part, fill);
    return center == nullptr ? x : x - load_part(center + k, part, 0.0f);
  }
  // (x - m) / temperature.
  DINO_FAST_INLINE Vec below(const float* row, int64_t k, int part, float fill, Vec m) const {
    return (at(row, k, part, fill) - m) * Vec(inverse_temp);
  }
};
Layer teacher_layer(const LogitTile& t) { return {t.center, static_cast<float>(t.inverse_teacher_temp)}; }
Layer student_layer(const LogitTile& t) { return {nullptr, static_cast<float>(t.inverse_student_temp)}; }

float row_maximum(const Layer& layer, const float* row, int64_t n) {
  Vec maximum(-kInfinity);
  for_vectors(n, [&](int64_t k, int part) { maximum = max(layer.at(row, k, part, -kInfinity), maximum); });
  return reduce_max(maximum);
}

// Moves a row's maximum up to the tile's, and returns (old - new) / temperature: 0 where it stays, or nothing has been
// summed yet.
float raise_maximum(const Layer& layer, float tile_maximum, float& maximum, double sum) {
  if (!(tile_maximum > maximum)) return 0.0f;
  const float shift = sum == 0.0 ? 0.0f : (maximum - tile_maximum) * layer.inverse_temp;
  maximum = tile_maximum;
  return shift;
}

void scale_row(float* row, int64_t width, float scale) {
  for (int64_t i = 0; i < width; ++i) row[i] *= scale;
}

// Where the tile and the state of image b are.
struct Image {
  const LogitTile& tile;
  int64_t b;
  int64_t teacher(int64_t u) const { return u * tile.images + b; }
  int64_t student(int64_t v) const { return (tile.T + v) * tile.images + b; }
  int64_t pair(int64_t u, int64_t v) const { return (u * tile.V + v) * tile.images + b; }
  float* logits(int64_t row) const { return tile.logits + row * tile.columns; }
};

// The teacher's row becomes e^((t - maximum) / temperature). `fresh` is its sum over this tile alone.
void attend_teacher(const Image& image, const RowState& state, int64_t u, double& fresh) {
  const LogitTile& tile = image.tile;
  const Layer layer = teacher_layer(tile);
  const int64_t row = image.teacher(u);
  float* x = image.logits(row);
  const float shift =
      raise_maximum(layer, row_maximum(layer, x, tile.columns), state.maxima[row], state.sums[row]);
  if (shift != 0.0f) {
    const double scale = std::exp(static_cast<double>(shift));
    state.sums[row] *= scale;
    for (int64_t v = 0; v < tile.V; ++v) state.pairs[image.pair(u, v)] *= scale;
    if (row < state.readers) scale_row(state.read + row * state.width, state.width, static_cast<float>(scale));
  }
  const Vec m(state.maxima[row]);
  Vec sum(0.0f);
  for_vectors(tile.columns, [&](int64_t k, int part) {
    const Vec e = exp(layer.below(x, k, part, -kInfinity, m));
    sum = sum + e;
    store_part(x + k, part, e);
  });
  fresh = wide_sum(sum);
}

// The student's row, its teachers' being weights already. N of the teachers' rows are taken along, from u on; the row is
// written by the last call alone, and its own sum taken by it.
template <int N> double attend_student(const Image& image, const RowState& state, int64_t v, int64_t u, bool write) {
  const LogitTile& tile = image.tile;
  const Layer layer = student_layer(tile);
  const int64_t row = image.student(v);
  float* x = image.logits(row);
  const Vec m(state.maxima[row]);
  const float* weights[N > 0 ? N : 1] = {};
  Vec sum(0.0f), pairs[N > 0 ? N : 1];
  for (int i = 0; i < N; ++i) weights[i] = image.logits(image.teacher(u + i)), pairs[i] = Vec(0.0f);
  for_vectors(tile.columns, [&](int64_t k, int part) {
    // Beyond the end the weights are 0 and the logit is finite, so that their product is 0.
    const Vec y = layer.below(x, k, part, state.maxima[row], m);
    for (int i = 0; i < N; ++i) pairs[i] = fma(load_part(weights[i] + k, part, 0.0f), y, pairs[i]);
    Vec e = exp(y);
    if (part < Vec::width) {  // only lanes that exist are summed
      float own[Vec::width];
      store(own, e);
      e = load_first(own, part, 0.0f);
    }
    sum = sum + e;
    if (write) store_part(x + k, part, e);
  });
  for (int i = 0; i < N; ++i) state.pairs[image.pair(u + i, v)] += wide_sum(pairs[i]);
  return wide_sum(sum);
}

void attend_image(const Image& image, const RowState& state, double* fresh) {
  const LogitTile& tile = image.tile;
  for (int64_t u = 0; u < tile.T; ++u) attend_teacher(image, state, u, fresh[u]);
  const Layer layer = student_layer(tile);
  for (int64_t v = 0; v < tile.V; ++v) {
    const int64_t row = image.student(v);
    const bool reads = row < state.readers;
    const float shift = raise_maximum(layer, row_maximum(layer, image.logits(row), tile.columns), state.maxima[row],
                                      state.sums[row]);
    if (shift != 0.0f) {
      const double scale = std::exp(static_cast<double>(shift));
      state.sums[row] *= scale;
      if (reads) scale_row(state.read + row * state.width, state.width, static_cast<float>(scale));
      // Earlier columns' weights now multiply logits further below the maximum.
      for (int64_t u = 0; u < tile.T; ++u) state.pairs[image.pair(u, v)] += state.sums[image.teacher(u)] * shift;
    }
    int64_t u = 0;
    for (; u + 2 < tile.T; u += 2) attend_student<2>(image, state, v, u, false);
    state.sums[row] += tile.T - u == 2 ? attend_student<2>(image, state, v, u, reads)
                                       : attend_student<1>(image, state, v, u, reads);
  }
  for (int64_t u = 0; u < tile.T; ++u) state.sums[image.teacher(u)] += fresh[u];
}

// The student's row less two teachers' (or one): see linear_dino_loss_weigh. `first`: the row is not yet multiplied by its factor.
template <int N> void weigh_student(const Image& image, int64_t v, int64_t u, bool first, const float* maxima,
                                    const float* factors, const float* pair_factors) {
  const LogitTile& tile = image.tile;
  const Layer layer = student_layer(tile);
  const int64_t row = image.student(v);
  float* x = image.logits(row);
  const bool weights_already = maxima == nullptr;
  const Vec m(weights_already ? 0.0f : maxima[row]), factor(factors[v * tile.images + image.b]);
  const float* weights[N];
  Vec share[N];
  for (int i = 0; i < N; ++i) {
    weights[i] = image.logits(image.teacher(u + i));
    share[i] = Vec(pair_factors[image.pair(u + i, v)]);
  }
  for_vectors(tile.columns, [&](int64_t k, int part) {
    Vec g = !first || weights_already ? load_part(x + k, part, 0.0f) : exp(layer.below(x, k, part, 0.0f, m));
    if (first) g = g * factor;
    for (int i = 0; i < N; ++i) g = fnma(share[i], load_part(weights[i] + k, part, 0.0f), g);
    store_part(x + k, part, g);
  });
}

void weigh_image(const Image& image, const float* maxima, const float* factors, const float* pair_factors) {
  const LogitTile& tile = image.tile;
  const Layer layer = teacher_layer(tile);
  for (int64_t u = 0; maxima != nullptr && u < tile.T; ++u) {
    float* x = image.logits(image.teacher(u));
    const Vec m(maxima[image.teacher(u)]);
    for_vectors(tile.columns, [&](int64_t k, int part) {
      store_part(x + k, part, exp(layer.below(x, k, part, 0.0f, m)));
    });
  }
  for (int64_t v = 0; v < tile.V; ++v) {
    int64_t u = 0;
    for (; u + 1 < tile.T; u += 2) weigh_student<2>(image, v, u, u == 0, maxima, factors, pair_factors);
    if (u < tile.T) weigh_student<1>(image, v, u, u == 0, maxima, factors, pair_factors);
  }
}

DINO_FAST_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec sum(0.0f);
  for_vectors(n, [&](int64_t i, int part) { sum = fma(load_part(a + i, part, 0.0f), load_part(b + i, part, 0.0f), sum); });
  return reduce_add(sum);
}

// Through the direction v / |v| itself: the component along it is removed as exactly as the direction is known.
void project_row(float* gradient, const float* weight, float gain, float& gain_gradient, int64_t width) {
  const float norm = std::sqrt(dot(weight, weight, width));
  const Vec length(norm), scale(gain / norm);
  const auto direction = [&](int64_t i, int part) { return load_part(weight + i, part, 0.0f) / length; };
  Vec sum(0.0f);
  for_vectors(width, [&](int64_t i, int part) { sum = fma(load_part(gradient + i, part, 0.0f), direction(i, part), sum); });
  gain_gradient = reduce_add(sum);
  const Vec along(gain_gradient);
  for_vectors(width, [&](int64_t i, int part) {
    store_part(gradient + i, part, fnma(along, direction(i, part), load_part(gradient + i, part, 0.0f)) * scale);
  });
}

// body(i) for each i of [0, n), `group` of them in a task.
template <typename F> void for_each(int64_t n, int64_t group, int threads, F body) {
  parallel_for((n + group - 1) / group, threads, [&](int64_t task) {
    const FlushSubnormals flush;
    const int64_t last = std::min(n, (task + 1) * group);
    for (int64_t i = task * group; i < last; ++i) body(i);
  });
}
int64_t images_of_task(const LogitTile& tile) { return std::max<int64_t>(1, kRowsOfTask / (tile.T + tile.V)); }

}  // namespace

void linear_dino_loss_attend(const LogitTile& tile, const RowState& state, int threads) {
  std::vector<double> fresh(tile.T * tile.images);
  for_each(tile.images, images_of_task(tile), threads,
           [&](int64_t b) { attend_image({tile, b}, state, fresh.data() + b * tile.T); });
}

void linear_dino_loss_weigh(const LogitTile& tile, const float* maxima, const float* factors, const float* pair_factors,
                            int threads) {
  for_each(tile.images, images_of_task(tile), threads,
           [&](int64_t b) { weigh_image({tile, b}, maxima, factors, pair_factors); });
}

void linear_dino_loss_normalize(const float* weight, const float* gain, float* effective, int64_t n, int64_t width,
                                int threads) {
  for_each(n, kRowsOfTask, threads, [&](int64_t k) {
    const float* v = weight + k * width;
    const Vec length(std::sqrt(dot(v, v, width))), own_gain(gain[k]);
    for_vectors(width, [&](int64_t i, int part) {
      store_part(effective + k * width + i, part, load_part(v + i, part, 0.0f) / length * own_gain);
    });
  });
}

void linear_dino_loss_project(float* gradient, const float* weight, const float* gain, float* gain_gradient, int64_t n,
                              int64_t width, int threads) {
  for_each(n, kRowsOfTask, threads, [&](int64_t k) {
    project_row(gradient + k * width, weight + k * width, gain[k], gain_gradient[k], width);
  });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
