// The table of a multi_crop plan: the parameters of each crop, and which block works on which part of which crop.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/block.h"
#include "cuda/multi_crop.h"
#include "multi_crop_math.h"

namespace dino_fast {
namespace cuda {

constexpr uint32_t PIXELS = 4 * THREADS;                     // of a block of the first, second and colour kernels
constexpr uint32_t BLUR_PIXELS = uint32_t(MAX_BLURRED_SIDE);  // of a block of the blurs, at most

struct CropAxis {
  uint64_t first, count, weights;  // int32 [to], [to], [taps, to]
  int32_t from, to;
};

struct CropStep {
  int32_t operation;  // brightness 0, contrast 1, saturation 2, hue 3; -1: nothing
  float factor;
};

struct CropEntry {
  uint64_t box;         // address of the box's first pixel in the first plane
  int64_t row, plane;   // bytes from a row, from a plane of the image to the next
  uint64_t out;         // address
  uint64_t between;     // uint8 [channels, rows, columns], after the first of the two passes
  uint64_t pixels;      // uint8 [channels, height, width]
  uint64_t sum;         // of levels where the contrast's turn comes
  CropAxis across, down;
  CropStep steps[4];
  pixel::Box blur_box;  // written by the weights kernel
  float radius;
  int32_t contrast;     // its place among the steps; 4: there is none
  uint32_t rows, columns;
  bool down_first, flip, grey, blur, solarize;
};

struct CropBlock {
  uint32_t crop, part;
};

// Lines of a plane that one block blurs, each `length` long.
DINO_FAST_BOTH uint32_t blurred_lines(uint32_t length, uint32_t lines) {
  const uint32_t fit = BLUR_PIXELS / length;
  return fit < lines ? fit : lines;
}

DINO_FAST_BOTH uint32_t parts_of(uint64_t whole, uint64_t part) { return uint32_t((whole + part - 1) / part); }

class CropPlanner {
 public:
  CropPlanner(const CropTask* tasks, int64_t n, const CropOutput& output) : output_(output), entries_(n) {
    for (int64_t i = 0; i < n; ++i) entries_[i] = entry(tasks[i]);
    for (int64_t i = 0; i < n; ++i) list_blocks(entries_[i], uint32_t(i));
  }

  CropTable table() {
    CropTable made;
    uint64_t end = place(0, entries_.size() * sizeof(CropEntry));
    for (int k = 0; k < CROP_KERNELS; ++k) {
      made.plan.blocks[k] = end;
      made.plan.counts[k] = uint32_t(blocks_[k].size());
      end = place(end, blocks_[k].size() * sizeof(CropBlock));
    }
    made.bytes.resize(end);
    for (CropEntry& e : entries_) {
      reserve(e.across, end);
      reserve(e.down, end);
      e.between = end;
      end = place(end, uint64_t(output_.channels) * e.rows * e.columns);
      e.pixels = end;
      if (e.contrast < 4 || e.blur) end = place(end, uint64_t(output_.channels) * e.across.to * e.down.to);
    }
    made.memory = end;
    std::memcpy(made.bytes.data(), entries_.data(), entries_.size() * sizeof(CropEntry));
    for (int k = 0; k < CROP_KERNELS; ++k) {
      if (!blocks_[k].empty())
        std::memcpy(made.bytes.data() + made.plan.blocks[k], blocks_[k].data(), blocks_[k].size() * sizeof(CropBlock));
    }
    made.plan.base = 0;
    made.plan.channels = uint32_t(output_.channels);
    made.plan.bfloat16 = output_.bfloat16;
    for (int c = 0; c < output_.channels; ++c) {
      const pixel::Normal normal = pixel::normal(output_.mean[c], output_.std[c]);
      made.plan.zero[c] = normal.zero;
      made.plan.scale[c] = normal.scale;
    }
    return made;
  }

 private:
  static uint64_t place(uint64_t end, uint64_t bytes) { return (end + bytes + 15) / 16 * 16; }

  static void reserve(CropAxis& axis, uint64_t& end) {
    const double stretch = std::max(1.0, double(axis.from) / axis.to);
    const uint64_t taps = uint64_t(4 * stretch) + 2;  // twice the filter's support, and both ends
    axis.first = end;
    axis.count = end = place(end, axis.to * sizeof(int32_t));
    axis.weights = end = place(end, axis.to * sizeof(int32_t));
    end = place(end, taps * axis.to * sizeof(int32_t));
  }

  CropEntry entry(const CropTask& task) const {
    CropEntry e = {};
    e.box = reinterpret_cast<uint64_t>(task.image) + task.top * task.width + task.left;
    e.row = task.width;
    e.plane = task.height * task.width;
    e.out = reinterpret_cast<uint64_t>(task.crop);
    e.across.from = int32_t(task.box_width), e.across.to = int32_t(task.crop_width);
    e.down.from = int32_t(task.box_height), e.down.to = int32_t(task.crop_height);
    e.contrast = 4;
    for (int k = 0; k < 4; ++k) {
      const int operation = task.order[k];
      e.steps[k] = {operation, operation < 0 ? 0.0f : task.factors[operation]};
      if (operation == 1 && e.contrast < 4) throw std::invalid_argument("multi_crop: order has the contrast twice");
      if (operation == 1) e.contrast = k;
    }
    e.down_first = output_.may_go_down_first &&
                   pixel::down_first(task.box_height - task.crop_height, task.box_width - task.crop_width);
    e.rows = uint32_t(e.down_first ? task.crop_height : task.box_height);
    e.columns = uint32_t(e.down_first ? task.box_width : task.crop_width);
    e.radius = task.radius;
    e.flip = task.flip;
    e.grey = task.grey && output_.channels == 3;
    e.blur = task.blur && task.radius > 0;
    e.solarize = task.solarize;
    const int64_t side = std::max(task.crop_height, task.crop_width);
    if (e.blur && side > MAX_BLURRED_SIDE) {
      throw std::invalid_argument("multi_crop: a blurred crop has a side of " + std::to_string(side) + " pixels; " +
                                  std::to_string(MAX_BLURRED_SIDE) + " is the most on a GPU");
    }
    if (uint64_t(e.rows) * e.columns >> 31 != 0 || task.crop_height * task.crop_width >> 31 != 0)
      throw std::invalid_argument("multi_crop: a box and its crop are too large for 31 bits");
    return e;
  }

  void list_blocks(const CropEntry& e, uint32_t crop) {
    const uint32_t height = uint32_t(e.down.to), width = uint32_t(e.across.to);
    const uint32_t planes = e.grey ? 1 : uint32_t(output_.channels);
    const uint32_t pixels = parts_of(uint64_t(height) * width, PIXELS);
    add(WEIGHTS, crop, parts_of(width, THREADS) + parts_of(height, THREADS));
    add(FIRST, crop, parts_of(uint64_t(e.rows) * e.columns, PIXELS));
    add(SECOND, crop, pixels);
    if (e.contrast < 4) add(COLOUR, crop, pixels);
    if (!e.blur) return;
    add(BLUR_ROWS, crop, planes * parts_of(height, blurred_lines(width, height)));
    add(BLUR_COLUMNS, crop, planes * parts_of(width, blurred_lines(height, width)));
  }

  void add(CropKernel kernel, uint32_t crop, uint32_t parts) {
    for (uint32_t part = 0; part < parts; ++part) blocks_[kernel].push_back({crop, part});
  }

  CropOutput output_;
  std::vector<CropEntry> entries_;
  std::vector<CropBlock> blocks_[CROP_KERNELS];
};

}  // namespace cuda
}  // namespace dino_fast
