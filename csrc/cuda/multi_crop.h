// Launchers of the CUDA multi_crop kernels: addresses and a stream; all work is queued, nothing waited for.
//
// A plan is made on the host from the same tasks as the CPU's. Its table is copied to the start of one block of device
// memory (16-byte aligned, uninitialised), of which the kernels use the rest. Addresses in the table are offsets into it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/multi_crop.h"

namespace dino_fast {
namespace cuda {

enum CropKernel { WEIGHTS, FIRST, SECOND, COLOUR, BLUR_ROWS, BLUR_COLUMNS, CROP_KERNELS };
constexpr int MAX_CHANNELS = 16;
constexpr int64_t MAX_BLURRED_SIDE = 8192;  // a line of a blurred crop lies in shared memory twice

struct CropPlan {
  uint64_t base;                  // device address
  uint64_t blocks[CROP_KERNELS];  // offsets of the kernels' lists of blocks
  uint32_t counts[CROP_KERNELS];  // their lengths: the grids
  uint32_t channels;
  bool bfloat16;
  float zero[MAX_CHANNELS], scale[MAX_CHANNELS];  // pixel::Normal of each channel
};

struct CropTable {
  std::vector<uint8_t> bytes;  // to be copied to the base
  uint64_t memory;             // bytes that the base must have
  CropPlan plan;               // its base still 0
};

// `image` and `crop` of the tasks are device addresses. Throws std::invalid_argument for tasks that the kernels cannot do.
CropTable plan_crops(const CropTask* tasks, int64_t n, const CropOutput& output);

// Throws std::runtime_error with CUDA's own text.
void multi_crop(const CropPlan& plan, uint64_t stream);

}  // namespace cuda
}  // namespace dino_fast
