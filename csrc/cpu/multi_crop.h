// Crops of images, resized, distorted and normalised. See dino_fast/ops/multi_crop/__init__.py.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace dino_fast {

struct CropTask {
  const uint8_t* image;     // [channels, height, width], contiguous
  int64_t height, width;    // of the image
  int64_t top, left, box_height, box_width;
  int64_t crop_height, crop_width;
  void* crop;               // [channels, crop_height, crop_width]: float32 or bfloat16
  int order[4];             // brightness 0, contrast 1, saturation 2, hue 3; -1: nothing
  float factors[4];         // of the four, hue in turns
  float radius;             // standard deviation of the blur, in pixels
  bool flip, grey, blur, solarize;
};

struct CropOutput {
  int channels;
  bool bfloat16;
  bool may_go_down_first;  // false: rows are always resampled before columns, as before Pillow 13
  const float* mean;  // [channels], of pixels in 0..1
  const float* std;
};

}  // namespace dino_fast

DINO_FAST_DECLARE(
  // [pixels, 3], as decoders write it, to planes [3, pixels].
  void multi_crop_planes(const uint8_t* from, uint8_t* to, int64_t pixels);
  void multi_crop(const ::dino_fast::CropTask* tasks, int64_t n, const ::dino_fast::CropOutput& output, int threads);
)
