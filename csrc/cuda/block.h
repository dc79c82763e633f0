// A block of threads, written once: on the device a kernel, on the host (in the tests) a loop over its threads.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DINO_FAST_BOTH __host__ __device__ __forceinline__
#else
#define DINO_FAST_BOTH inline
#endif

// On the device a phase of a block runs once in each thread; on the host it is a loop over the threads.
#ifdef __CUDA_ARCH__
#define DINO_FAST_EACH_THREAD(thread) \
  for (uint32_t thread = threadIdx.x, again_ = 1; again_; again_ = 0)
#define DINO_FAST_SYNC() __syncthreads()
#else
#define DINO_FAST_EACH_THREAD(thread) for (uint32_t thread = 0; thread < THREADS; ++thread)
#define DINO_FAST_SYNC() (void)0
#endif

namespace dino_fast {
namespace cuda {

constexpr uint32_t THREADS = 256;

}  // namespace cuda
}  // namespace dino_fast
