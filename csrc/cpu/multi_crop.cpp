// multi_crop on the CPU: one task a crop, 8 bits after every operation, equal to Pillow's to the bit.
//
// Memory of a crop: the box's rows by the crop's columns, and the crop three times, one byte a pixel and channel.
// Operations at 500 x 375, 2 crops of 224 and 8 of 96: 12 M multiply-adds to resize, 0.5 M values in each later operation.
#include "cpu/multi_crop.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/multi_crop_resample.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "multi_crop_math.h"

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

// A thread's buffers, kept from crop to crop.
struct Scratch {
  Filter across, down;
  std::vector<int16_t> pairs;
  std::vector<uint8_t> rows, columns, planes, blurred, line;
  std::vector<uint32_t> sums;
};

// The crop while it is worked on: planes of 8-bit pixels whose rows are padded to whole vectors.
struct Planes {
  uint8_t* pixels;
  int channels;
  int64_t height, width, stride;
  int64_t size() const { return height * stride; }
  uint8_t* plane(int c) const { return pixels + c * size(); }
};

void blend_with(const Planes& planes, int other, float factor) {
  const int64_t n = planes.channels * planes.size();
  uint8_t* p = planes.pixels;
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(pixel::blend(other, p[i], factor));
}

// The mean of the luma, or of all channels where there is no luma, to the nearest integer.
int mean_level(const Planes& planes) {
  int64_t sum = 0;
  const int summed = planes.channels == 3 ? 1 : planes.channels;
  for (int c = 0; c < summed; ++c) {
    for (int64_t y = 0; y < planes.height; ++y) {
      const uint8_t* row = planes.plane(c) + y * planes.stride;
      uint32_t part = 0;
      if (planes.channels == 3) {
        const uint8_t *g = row + planes.size(), *b = g + planes.size();
        for (int64_t x = 0; x < planes.width; ++x) part += pixel::luma(row[x], g[x], b[x]);
      } else {
        for (int64_t x = 0; x < planes.width; ++x) part += row[x];
      }
      sum += part;
    }
  }
  return static_cast<int>(static_cast<double>(sum) / static_cast<double>(summed * planes.height * planes.width) + 0.5);
}

void saturation(const Planes& planes, float factor) {
  uint8_t* __restrict r = planes.plane(0);
  uint8_t* __restrict g = planes.plane(1);
  uint8_t* __restrict b = planes.plane(2);
  for (int64_t i = 0, n = planes.size(); i < n; ++i) {
    const int level = pixel::luma(r[i], g[i], b[i]);
    r[i] = static_cast<uint8_t>(pixel::blend(level, r[i], factor));
    g[i] = static_cast<uint8_t>(pixel::blend(level, g[i], factor));
    b[i] = static_cast<uint8_t>(pixel::blend(level, b[i], factor));
  }
}

void hue(const Planes& planes, float factor) {
  const int turn = static_cast<int>(static_cast<double>(factor) * 255);
  uint8_t* __restrict r = planes.plane(0);
  uint8_t* __restrict g = planes.plane(1);
  uint8_t* __restrict b = planes.plane(2);
  for (int64_t i = 0, n = planes.size(); i < n; ++i) {
    int vr = r[i], vg = g[i], vb = b[i];
    pixel::turn_hue(vr, vg, vb, turn);
    r[i] = static_cast<uint8_t>(vr);
    g[i] = static_cast<uint8_t>(vg);
    b[i] = static_cast<uint8_t>(vb);
  }
}

void jitter(const Planes& planes, const CropTask& task) {
  for (int operation : task.order) {
    if (operation < 0) continue;
    const float factor = task.factors[operation];
    if (operation == 0) blend_with(planes, 0, factor);
    else if (operation == 1) blend_with(planes, mean_level(planes), factor);
    else if (planes.channels == 3 && operation == 2) saturation(planes, factor);
    else if (planes.channels == 3) hue(planes, factor);
  }
}

void grey(const Planes& planes) {
  uint8_t* __restrict r = planes.plane(0);
  uint8_t* __restrict g = planes.plane(1);
  uint8_t* __restrict b = planes.plane(2);
  for (int64_t i = 0, n = planes.size(); i < n; ++i) {
    r[i] = g[i] = b[i] = static_cast<uint8_t>(pixel::luma(r[i], g[i], b[i]));
  }
}

// One box blur: pixel i of line y from lines y - radius - 1 to y + radius + 1, which the caller's `line` finds.
template <typename Line>
DINO_FAST_INLINE void box_rows(const pixel::Box& box, int64_t n, uint32_t* __restrict sums, uint8_t* __restrict out,
                               const Line& line) {
  const int r = box.radius;
  const uint8_t *before = line(-r - 1), *after = line(r + 1), *middle = line(0);
  if (r == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = pixel::box_mean(box, middle[i], before[i] + after[i]);
  } else if (r == 1) {
    const uint8_t *left = line(-1), *right = line(1);
    for (int64_t i = 0; i < n; ++i) {
      out[i] = pixel::box_mean(box, left[i] + middle[i] + right[i], before[i] + after[i]);
    }
  } else {
    std::memset(sums, 0, n * sizeof(uint32_t));
    for (int d = -r; d <= r; ++d) {
      const uint8_t* other = line(d);
      for (int64_t i = 0; i < n; ++i) sums[i] += other[i];
    }
    for (int64_t i = 0; i < n; ++i) out[i] = pixel::box_mean(box, sums[i], before[i] + after[i]);
  }
}

// Three box blurs along the rows, then three down the columns; beyond the edge is the edge.
void blur_plane(uint8_t* plane, const Planes& shape, const pixel::Box& box, Scratch& scratch) {
  const int64_t w = shape.width, h = shape.height, stride = shape.stride, margin = box.radius + 1;
  scratch.line.resize(stride + 2 * margin);
  scratch.sums.resize(stride);
  scratch.blurred.resize(shape.size());
  uint8_t *line = scratch.line.data(), *other = scratch.blurred.data();
  for (int64_t y = 0; y < h; ++y) {
    uint8_t* row = plane + y * stride;
    for (int pass = 0; pass < 3; ++pass) {
      std::memset(line, row[0], margin);
      std::memcpy(line + margin, row, w);
      std::memset(line + margin + w, row[w - 1], stride - w + margin);
      box_rows(box, stride, scratch.sums.data(), row, [&](int64_t d) { return line + margin + d; });
    }
  }
  for (int pass = 0; pass < 3; ++pass) {
    const uint8_t* from = pass == 1 ? other : plane;
    uint8_t* to = pass == 1 ? plane : other;
    for (int64_t y = 0; y < h; ++y) {
      box_rows(box, stride, scratch.sums.data(), to + y * stride,
               [&](int64_t d) { return from + std::clamp<int64_t>(y + d, 0, h - 1) * stride; });
    }
  }
  std::memcpy(plane, other, shape.size());
}

template <typename T>
void write(const Planes& planes, const CropTask& task, const CropOutput& output) {
  T* __restrict out = static_cast<T*>(task.crop);
  const int mirrored = task.solarize ? 128 : 256;  // levels from here on are taken from 255
  for (int c = 0; c < planes.channels; ++c) {
    const pixel::Normal normal = pixel::normal(output.mean[c], output.std[c]);
    for (int64_t y = 0; y < planes.height; ++y) {
      const uint8_t* __restrict row = planes.plane(c) + y * planes.stride;
      for (int64_t x = 0; x < planes.width; ++x) {
        const int level = row[x] < mirrored ? row[x] : 255 - row[x];
        out[x] = from_float<T>(pixel::normalised(normal, level));
      }
      out += planes.width;
    }
  }
}

void one_crop(const CropTask& task, const CropOutput& output) {
  static thread_local Scratch scratch;
  const int channels = output.channels;
  const bool down_first = output.may_go_down_first && pixel::down_first(task.box_height - task.crop_height,
                                                                        task.box_width - task.crop_width);
  const int64_t stride = padded(task.crop_width), row_stride = padded(task.box_width);
  const int64_t column_stride = padded(down_first ? task.crop_height : task.box_height);
  make_filter(scratch.across, static_cast<int>(task.box_width), static_cast<int>(task.crop_width));
  make_filter(scratch.down, static_cast<int>(task.box_height), static_cast<int>(task.crop_height));
  scratch.columns.resize(stride * column_stride);
  if (down_first) scratch.rows.resize(task.crop_height * row_stride);
  scratch.planes.resize(channels * task.crop_height * stride);
  const Planes planes{scratch.planes.data(), channels, task.crop_height, task.crop_width, stride};
  for (int c = 0; c < channels; ++c) {
    const uint8_t* box = task.image + (c * task.height + task.top) * task.width + task.left;
    if (down_first) {
      resample_down(box, task.box_width, task.width, task.box_height, scratch.down, scratch.rows.data(), row_stride);
      resample(scratch.rows.data(), task.crop_height, task.box_width, row_stride, scratch.across, task.flip, scratch.pairs,
               scratch.columns.data(), column_stride);
      transpose(scratch.columns.data(), column_stride, task.crop_height, task.crop_width, planes.plane(c), stride);
    } else {
      resample(box, task.box_height, task.box_width, task.width, scratch.across, task.flip, scratch.pairs,
               scratch.columns.data(), column_stride);
      resample(scratch.columns.data(), task.crop_width, task.box_height, column_stride, scratch.down, false, scratch.pairs,
               planes.plane(c), stride);
    }
  }
  jitter(planes, task);
  const bool greyed = task.grey && channels == 3;
  if (greyed) grey(planes);
  if (task.blur && task.radius > 0) {
    const pixel::Box box = pixel::box_of(task.radius);
    for (int c = 0; c < (greyed ? 1 : channels); ++c) blur_plane(planes.plane(c), planes, box, scratch);
    for (int c = 1; greyed && c < channels; ++c) std::memcpy(planes.plane(c), planes.plane(0), planes.size());
  }
  if (output.bfloat16) write<bf16>(planes, task, output);
  else write<float>(planes, task, output);
}

}  // namespace

void multi_crop_planes(const uint8_t* __restrict from, uint8_t* __restrict to, int64_t pixels) {
  uint8_t* __restrict g = to + pixels;
  uint8_t* __restrict b = g + pixels;
  for (int64_t i = 0; i < pixels; ++i) {
    to[i] = from[3 * i];
    g[i] = from[3 * i + 1];
    b[i] = from[3 * i + 2];
  }
}

void multi_crop(const CropTask* tasks, int64_t n, const CropOutput& output, int threads) {
  parallel_for(n, threads, [&](int64_t i) { one_crop(tasks[i], output); });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
