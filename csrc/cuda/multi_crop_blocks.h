// The work of one block of each multi_crop kernel. Plain C++ with CUDA's qualifiers: on the device a block is 256
// threads, in the tests it is a loop over them. The arithmetic of a pixel is multi_crop_math.h, shared with the CPU.
//
// Bytes of a crop of P pixels and C channels, made of a box by way of I pixels between the two passes, e bytes a value:
//   weights   4 a tap and pixel along each axis
//   first     C box + C I
//   second    C I + e C P, or C P where the contrast or a blur follows
//   colour    C P + e C P, or 2 C P before a blur
//   blurs     C P each way along the rows; C P + e C P down the columns
// With the 500 x 375 photographs and 2 x 224 + 8 x 96 crops of the published recipe that is 0.6 MB read of the boxes, about 4 MB
// in between, most of it in the L2 cache, and 2.1 MB of float32 written an image; about 11 million taps.
#pragma once

#include "cuda/multi_crop_plan.h"

namespace dino_fast {
namespace cuda {

struct CropWork {
  CropEntry* entry;
  uint32_t part;
};

DINO_FAST_BOTH CropWork work_of(const CropPlan& plan, CropKernel kernel, uint32_t block) {
  const CropBlock at = reinterpret_cast<const CropBlock*>(plan.base + plan.blocks[kernel])[block];
  return {reinterpret_cast<CropEntry*>(plan.base) + at.crop, at.part};
}

template <typename T>
DINO_FAST_BOTH T* in_plan(const CropPlan& plan, uint64_t offset) {
  return reinterpret_cast<T*>(plan.base + offset);
}

// ---- coefficients ----

DINO_FAST_BOTH void weights_of_pixel(const CropPlan& plan, const CropAxis& axis, int at) {
  const pixel::Taps taps = pixel::taps(at, axis.from, axis.to);
  double sum = 0;
  for (int i = 0; i < taps.count; ++i) sum += pixel::weight(taps, i);
  int32_t* weights = in_plan<int32_t>(plan, axis.weights) + at;
  for (int i = 0; i < taps.count; ++i) {
    const double weight = pixel::weight(taps, i);
    weights[int64_t(i) * axis.to] = pixel::to_fixed(sum != 0 ? weight / sum : weight);
  }
  in_plan<int32_t>(plan, axis.first)[at] = taps.first;
  in_plan<int32_t>(plan, axis.count)[at] = taps.count;
}

DINO_FAST_BOTH void weights_block(const CropPlan& plan, uint32_t block) {
  const CropWork work = work_of(plan, WEIGHTS, block);
  const CropAxis across = work.entry->across, down = work.entry->down;
  const uint32_t parts = parts_of(across.to, THREADS);
  const bool is_across = work.part < parts;
  DINO_FAST_EACH_THREAD(thread) {
    const int at = int((is_across ? work.part : work.part - parts) * THREADS + thread);
    const CropAxis axis = is_across ? across : down;
    if (at < axis.to) weights_of_pixel(plan, axis, at);
    if (work.part == 0 && thread == 0 && work.entry->blur) work.entry->blur_box = pixel::box_of(work.entry->radius);
  }
}

// ---- the two passes ----

// Where the taps of a pixel are: `step` bytes apart along the axis, N planes `plane` bytes apart.
struct CropLine {
  const uint8_t* start;
  int64_t step, plane;
};

template <int N>
DINO_FAST_BOTH void resampled(const CropPlan& plan, const CropAxis& axis, int at, const CropLine& line,
                              int (&level)[N]) {
  const int first = in_plan<const int32_t>(plan, axis.first)[at], count = in_plan<const int32_t>(plan, axis.count)[at];
  const int32_t* weights = in_plan<const int32_t>(plan, axis.weights) + at;
  const uint8_t* from = line.start + first * line.step;
  int sums[N];
#pragma unroll
  for (int c = 0; c < N; ++c) sums[c] = 1 << (pixel::kCoefficientBits - 1);
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    const int weight = weights[int64_t(i) * axis.to];
#pragma unroll
    for (int c = 0; c < N; ++c) sums[c] += from[i * line.step + c * line.plane] * weight;
  }
#pragma unroll
  for (int c = 0; c < N; ++c) level[c] = pixel::clip(sums[c] >> pixel::kCoefficientBits);
}

template <int N>
DINO_FAST_BOTH void first_pixels(const CropPlan& plan, const CropWork& work, uint32_t thread) {
  const CropEntry& e = *work.entry;
  const bool down_first = e.down_first;
  const CropAxis axis = down_first ? e.down : e.across;
  const uint32_t columns = e.columns, pixels = e.rows * columns;
  const uint8_t* const box = reinterpret_cast<const uint8_t*>(e.box);
  const int64_t row = e.row, plane = e.plane;
  uint8_t* const between = in_plan<uint8_t>(plan, e.between);
#pragma unroll 1
  for (uint32_t k = 0; k < PIXELS; k += THREADS) {
    const uint32_t i = work.part * PIXELS + k + thread;
    if (i >= pixels) return;
    const uint32_t y = i / columns, x = i - y * columns;
    for (uint32_t c = 0; c < plan.channels; c += N) {
      const uint8_t* const start = box + c * plane + (down_first ? x : y * row);
      int level[N];
      resampled<N>(plan, axis, int(down_first ? y : x), {start, down_first ? row : 1, plane}, level);
#pragma unroll
      for (int j = 0; j < N; ++j) between[uint64_t(c + j) * pixels + i] = uint8_t(level[j]);
    }
  }
}

DINO_FAST_BOTH void first_block(const CropPlan& plan, uint32_t block) {
  const CropWork work = work_of(plan, FIRST, block);
  DINO_FAST_EACH_THREAD(thread) {
    if (plan.channels == 3) first_pixels<3>(plan, work, thread);
    else first_pixels<1>(plan, work, thread);
  }
}

// ---- colour ----

// Steps [begin, end) of the jitter; `mean` is the contrast's. All threads of a block take the same way.
template <int N>
DINO_FAST_BOTH void jitter(const CropStep* steps, int begin, int end, int mean, int (&level)[N]) {
#pragma unroll 1
  for (int k = begin; k < end; ++k) {
    const CropStep step = steps[k];
    if (step.operation < 0) continue;
    if (step.operation <= 1) {
      const int other = step.operation == 0 ? 0 : mean;
#pragma unroll
      for (int c = 0; c < N; ++c) level[c] = pixel::blend(other, level[c], step.factor);
    } else if (N == 3 && step.operation == 2) {
      const int luma = pixel::luma(level[0], level[N / 2], level[N - 1]);
#pragma unroll
      for (int c = 0; c < N; ++c) level[c] = pixel::blend(luma, level[c], step.factor);
    } else if (N == 3) {
      const int turn = int(double(step.factor) * 255);
      pixel::turn_hue(level[0], level[N / 2], level[N - 1], turn);
    }
  }
}

template <int N>
DINO_FAST_BOTH void grey(int (&level)[N]) {
  const int luma = pixel::luma(level[0], level[N / 2], level[N - 1]);
#pragma unroll
  for (int c = 0; c < N; ++c) level[c] = luma;
}

DINO_FAST_BOTH uint16_t bfloat16_bits(float x) {  // to nearest, ties to even; x is finite
  union {
    float value;
    uint32_t bits;
  } u = {x};
  return uint16_t((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

// A value of the result: solarized, normalised. `i` counts values of the whole crop, of which it is in channel c.
DINO_FAST_BOTH void finish(const CropPlan& plan, uint64_t out, bool solarize, uint32_t c, uint64_t i, int level) {
  level = solarize && level >= 128 ? 255 - level : level;
  const float value = pixel::normalised({plan.zero[c], plan.scale[c]}, level);
  if (plan.bfloat16) reinterpret_cast<uint16_t*>(out)[i] = bfloat16_bits(value);
  else reinterpret_cast<float*>(out)[i] = value;
}

// All threads of a warp come here together. Whole numbers: the order does not matter.
DINO_FAST_BOTH void add_to(uint64_t* total, uint32_t value) {
#ifdef __CUDA_ARCH__
  const uint32_t sum = __reduce_add_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), (unsigned long long)sum);
#else
  *total += value;
#endif
}

// The second pass, the flip, and the jitter up to the contrast; to the end where neither that nor a blur is to come.
// Returns the sum of the levels of which the contrast needs the mean.
template <int N>
DINO_FAST_BOTH uint32_t second_pixels(const CropPlan& plan, const CropWork& work, uint32_t thread) {
  const CropEntry& e = *work.entry;
  const CropAxis axis = e.down_first ? e.across : e.down;
  const bool down_first = e.down_first, flip = e.flip, greyed = e.grey, solarize = e.solarize;
  const uint32_t width = uint32_t(e.across.to), pixels = width * uint32_t(e.down.to), columns = e.columns;
  const uint64_t plane = uint64_t(e.rows) * columns, out = e.out;
  const int contrast = e.contrast;
  const bool contrasted = contrast < 4, ends = !contrasted && !e.blur;
  const uint8_t* const between = in_plan<const uint8_t>(plan, e.between);
  uint8_t* const kept = in_plan<uint8_t>(plan, e.pixels);
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t k = 0; k < PIXELS; k += THREADS) {
    const uint32_t i = work.part * PIXELS + k + thread;
    if (i >= pixels) return sum;
    const uint32_t y = i / width, x = i - y * width, to = flip ? y * width + width - 1 - x : i;
    for (uint32_t c = 0; c < plan.channels; c += N) {
      const uint8_t* const start = between + c * plane + (down_first ? y * columns : x);
      int level[N];
      resampled<N>(plan, axis, int(down_first ? x : y), {start, down_first ? 1 : columns, int64_t(plane)}, level);
      jitter<N>(e.steps, 0, contrast, 0, level);
      if (contrasted) sum += uint32_t(N == 3 ? pixel::luma(level[0], level[N / 2], level[N - 1]) : level[0]);
      else if (N == 3 && greyed) grey<N>(level);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const uint64_t at = uint64_t(c + j) * pixels + to;
        if (ends) finish(plan, out, solarize, c + j, at, level[j]);
        else kept[at] = uint8_t(level[j]);
      }
    }
  }
  return sum;
}

DINO_FAST_BOTH void second_block(const CropPlan& plan, uint32_t block) {
  const CropWork work = work_of(plan, SECOND, block);
  DINO_FAST_EACH_THREAD(thread) {
    const uint32_t sum = plan.channels == 3 ? second_pixels<3>(plan, work, thread) : second_pixels<1>(plan, work, thread);
    if (work.entry->contrast < 4) add_to(&work.entry->sum, sum);
  }
}

// The jitter from the contrast on.
template <int N>
DINO_FAST_BOTH void colour_pixels(const CropPlan& plan, const CropWork& work, int mean, uint32_t thread) {
  const CropEntry& e = *work.entry;
  const uint32_t pixels = uint32_t(e.across.to) * uint32_t(e.down.to);
  const uint64_t out = e.out;
  const int contrast = e.contrast;
  const bool greyed = e.grey, blurred = e.blur, solarize = e.solarize;
  uint8_t* const kept = in_plan<uint8_t>(plan, e.pixels);
#pragma unroll 1
  for (uint32_t k = 0; k < PIXELS; k += THREADS) {
    const uint32_t i = work.part * PIXELS + k + thread;
    if (i >= pixels) return;
    for (uint32_t c = 0; c < plan.channels; c += N) {
      int level[N];
#pragma unroll
      for (int j = 0; j < N; ++j) level[j] = kept[uint64_t(c + j) * pixels + i];
      jitter<N>(e.steps, contrast, 4, mean, level);
      if (N == 3 && greyed) grey<N>(level);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const uint64_t at = uint64_t(c + j) * pixels + i;
        if (blurred) kept[at] = uint8_t(level[j]);
        else finish(plan, out, solarize, c + j, at, level[j]);
      }
    }
  }
}

DINO_FAST_BOTH void colour_block(const CropPlan& plan, uint32_t block) {
  const CropWork work = work_of(plan, COLOUR, block);
  const CropEntry& e = *work.entry;
  const int64_t values = int64_t(plan.channels == 3 ? 1 : plan.channels) * e.down.to * e.across.to;
  const int mean = int(double(e.sum) / double(values) + 0.5);
  DINO_FAST_EACH_THREAD(thread) {
    if (plan.channels == 3) colour_pixels<3>(plan, work, mean, thread);
    else colour_pixels<1>(plan, work, mean, thread);
  }
}

// ---- blur ----

struct BlurScratch {
  uint8_t pixels[2][BLUR_PIXELS];
};

// Pixel i of a line of n whose pixels are `step` apart; beyond the edge is the edge.
DINO_FAST_BOTH uint8_t boxed(const pixel::Box& box, const uint8_t* line, int i, int n, int step) {
  uint32_t sum = 0;
  for (int d = -box.radius; d <= box.radius; ++d) sum += line[pixel::most(0, pixel::least(i + d, n - 1)) * step];
  const int before = pixel::most(0, i - box.radius - 1), after = pixel::least(i + box.radius + 1, n - 1);
  return pixel::box_mean(box, sum, uint32_t(line[before * step]) + line[after * step]);
}

DINO_FAST_BOTH void blur_rows_block(const CropPlan& plan, uint32_t block, BlurScratch& scratch) {
  const CropWork work = work_of(plan, BLUR_ROWS, block);
  const CropEntry& e = *work.entry;
  const uint32_t width = uint32_t(e.across.to), height = uint32_t(e.down.to), lines = blurred_lines(width, height);
  const uint32_t parts = parts_of(height, lines), plane = work.part / parts, first = (work.part - plane * parts) * lines;
  const uint32_t n = (first + lines < height ? lines : height - first) * width;
  const pixel::Box box = e.blur_box;
  uint8_t* const kept = in_plan<uint8_t>(plan, e.pixels) + uint64_t(plane) * width * height + first * width;
  DINO_FAST_EACH_THREAD(thread) {
    for (uint32_t i = thread; i < n; i += THREADS) scratch.pixels[0][i] = kept[i];
  }
  for (int pass = 0; pass < 3; ++pass) {
    DINO_FAST_SYNC();
    const uint8_t* const from = scratch.pixels[pass & 1];
    uint8_t* const to = pass == 2 ? kept : scratch.pixels[1 - pass];
    DINO_FAST_EACH_THREAD(thread) {
      for (uint32_t i = thread; i < n; i += THREADS) {
        const uint32_t x = i % width;
        to[i] = boxed(box, from + (i - x), int(x), int(width), 1);
      }
    }
  }
}

DINO_FAST_BOTH void blur_columns_block(const CropPlan& plan, uint32_t block, BlurScratch& scratch) {
  const CropWork work = work_of(plan, BLUR_COLUMNS, block);
  const CropEntry& e = *work.entry;
  const uint32_t width = uint32_t(e.across.to), height = uint32_t(e.down.to), lines = blurred_lines(height, width);
  const uint32_t parts = parts_of(width, lines), plane = work.part / parts, first = (work.part - plane * parts) * lines;
  const uint32_t strip = first + lines < width ? lines : width - first, n = strip * height;
  const uint32_t channels = e.grey ? plan.channels : 1;  // a grey plane is written to all
  const uint64_t pixels = uint64_t(width) * height, out = e.out;
  const bool solarize = e.solarize;
  const pixel::Box box = e.blur_box;
  const uint8_t* const kept = in_plan<const uint8_t>(plan, e.pixels) + plane * pixels + first;
  DINO_FAST_EACH_THREAD(thread) {
    for (uint32_t i = thread; i < n; i += THREADS) {
      const uint32_t y = i / strip;
      scratch.pixels[0][i] = kept[y * width + (i - y * strip)];
    }
  }
  for (int pass = 0; pass < 3; ++pass) {
    DINO_FAST_SYNC();
    const uint8_t* const from = scratch.pixels[pass & 1];
    uint8_t* const to = scratch.pixels[1 - (pass & 1)];
    DINO_FAST_EACH_THREAD(thread) {
      for (uint32_t i = thread; i < n; i += THREADS) {
        const uint32_t y = i / strip, x = i - y * strip;
        const uint8_t level = boxed(box, from + x, int(y), int(height), int(strip));
        if (pass < 2) {
          to[i] = level;
          continue;
        }
        for (uint32_t c = plane; c < plane + channels; ++c)
          finish(plan, out, solarize, c, c * pixels + y * width + first + x, level);
      }
    }
  }
}

}  // namespace cuda
}  // namespace dino_fast
