// Crops of a whole batch in six launches; the work of a block is in multi_crop_blocks.h.
//
//   weights       one thread an output pixel of each axis: the filter's coefficients
//   first         along one axis, to 8 bits
//   second        along the other; flip, jitter up to the contrast, whose mean is summed; most crops without blur end here
//   colour        crops with contrast: the rest of the jitter
//   blur_rows     blurred crops: three box blurs in shared memory
//   blur_columns  the same down the columns, and the end
//
// Blocks are listed by the host, which knows every size: crops of any size share a launch, and none waits for the largest.
// Compile with --fmad=false; see multi_crop_math.h.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/multi_crop_blocks.h"

namespace dino_fast {
namespace cuda {
namespace {

__global__ void __launch_bounds__(THREADS) multi_crop_weights(const __grid_constant__ CropPlan plan) {
  weights_block(plan, blockIdx.x);
}

__global__ void __launch_bounds__(THREADS, 3) multi_crop_first(const __grid_constant__ CropPlan plan) {
  first_block(plan, blockIdx.x);
}

__global__ void __launch_bounds__(THREADS, 3) multi_crop_second(const __grid_constant__ CropPlan plan) {
  second_block(plan, blockIdx.x);
}

__global__ void __launch_bounds__(THREADS, 4) multi_crop_colour(const __grid_constant__ CropPlan plan) {
  colour_block(plan, blockIdx.x);
}

__global__ void __launch_bounds__(THREADS, 5) multi_crop_blur_rows(const __grid_constant__ CropPlan plan) {
  __shared__ BlurScratch scratch;
  blur_rows_block(plan, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(THREADS, 5) multi_crop_blur_columns(const __grid_constant__ CropPlan plan) {
  __shared__ BlurScratch scratch;
  blur_columns_block(plan, blockIdx.x, scratch);
}

using Kernel = void (*)(CropPlan);
constexpr Kernel KERNELS[CROP_KERNELS] = {multi_crop_weights, multi_crop_first,     multi_crop_second,
                                          multi_crop_colour,  multi_crop_blur_rows, multi_crop_blur_columns};
constexpr const char* NAMES[CROP_KERNELS] = {"weights", "first", "second", "colour", "blur_rows", "blur_columns"};

}  // namespace

CropTable plan_crops(const CropTask* tasks, int64_t n, const CropOutput& output) {
  return CropPlanner(tasks, n, output).table();
}

void multi_crop(const CropPlan& plan, uint64_t stream) {
  for (int k = 0; k < CROP_KERNELS; ++k) {
    if (plan.counts[k] == 0) continue;
    KERNELS[k]<<<plan.counts[k], THREADS, 0, reinterpret_cast<cudaStream_t>(stream)>>>(plan);
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) continue;
    throw std::runtime_error(std::string("CUDA kernel multi_crop_") + NAMES[k] + " did not launch: " +
                             cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace cuda
}  // namespace dino_fast
