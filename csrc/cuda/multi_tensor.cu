// AdamW, the teacher's EMA and the bfloat16 copies of both for all tensors in one launch; passes over memory and byte
// counts are in multi_tensor_blocks.h.
//
//   norms    one block a chunk; the last block of a tensor adds up its chunks in a fixed order (integer tickets, no
//            float atomics: the same gradients give the same bits)
//   prepare  one thread a tensor: step count and bias corrections, which stay on the device
//   update   one block a chunk
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/multi_tensor_blocks.h"

namespace dino_fast {
namespace cuda {
namespace {

constexpr size_t UPLOAD_BYTES = 3968;  // kernel arguments end at 4 KB before CUDA 12.1

struct Upload {
  uint64_t* to;
  uint32_t words;
  uint64_t from[UPLOAD_BYTES / 8];
};

__global__ void __launch_bounds__(THREADS) multi_tensor_upload(const __grid_constant__ Upload upload) {
  for (uint32_t i = threadIdx.x; i < upload.words; i += THREADS) upload.to[i] = upload.from[i];
}

__global__ void __launch_bounds__(THREADS) multi_tensor_fill_chunks(const Plan plan) {
  const uint32_t chunk = blockIdx.x * THREADS + threadIdx.x;
  if (chunk < plan.chunks) fill_chunk(plan, chunk);
}

__global__ void __launch_bounds__(THREADS, 4) multi_tensor_norms(const Plan plan, float* norms) {
  __shared__ Scratch scratch;
  norms_block(plan, norms, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(THREADS)
    multi_tensor_prepare(const Plan plan, const float* multipliers, const float* found_inf) {
  const uint32_t tensor = blockIdx.x * THREADS + threadIdx.x;
  if (tensor < plan.tensors) prepare_tensor(plan, multipliers, found_inf, tensor);
}

// Three blocks leave 80 registers a thread; their 768 threads keep 60 KB in flight, more than the 40 KB that hide the
// latency of device memory at 25 bytes a nanosecond and multiprocessor. Four would spill.
__global__ void __launch_bounds__(THREADS, 3) multi_tensor_update(const Plan plan) { update_block(plan, blockIdx.x); }

__global__ void __launch_bounds__(THREADS, 6) multi_tensor_ema(const Plan plan, const float* found_inf) {
  ema_block(plan, found_inf, blockIdx.x);
}

cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA kernel multi_tensor_") + kernel + " did not launch: " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

}  // namespace

Offsets offsets_of(uint32_t tensors, uint32_t chunks) { return offsets(tensors, chunks); }

int64_t chunk_elements() { return CHUNK; }

void upload(uint64_t address, const char* bytes, size_t size, uint64_t stream) {
  for (size_t done = 0; done < size; done += UPLOAD_BYTES) {
    Upload part;
    const size_t length = std::min(UPLOAD_BYTES, size - done);
    part.to = reinterpret_cast<uint64_t*>(address + done);
    part.words = uint32_t(length / 8);
    std::memcpy(part.from, bytes + done, length);
    multi_tensor_upload<<<1, THREADS, 0, stream_of(stream)>>>(part);
    check_launch("upload");
  }
}

void fill_chunks(const Plan& plan, uint64_t stream) {
  if (plan.chunks == 0) return;
  multi_tensor_fill_chunks<<<(plan.chunks + THREADS - 1) / THREADS, THREADS, 0, stream_of(stream)>>>(plan);
  check_launch("fill_chunks");
}

void norms(const Plan& plan, uint64_t to, uint64_t stream) {
  if (plan.chunks == 0) return;
  multi_tensor_norms<<<plan.chunks, THREADS, 0, stream_of(stream)>>>(plan, reinterpret_cast<float*>(to));
  check_launch("norms");
}

void adamw_ema(const Plan& plan, uint64_t multipliers, uint64_t found_inf, uint64_t stream) {
  if (plan.tensors == 0) return;
  multi_tensor_prepare<<<(plan.tensors + THREADS - 1) / THREADS, THREADS, 0, stream_of(stream)>>>(
      plan, reinterpret_cast<const float*>(multipliers), reinterpret_cast<const float*>(found_inf));
  check_launch("prepare");
  if (plan.chunks == 0) return;  // empty shards count their steps all the same
  multi_tensor_update<<<plan.chunks, THREADS, 0, stream_of(stream)>>>(plan);
  check_launch("update");
}

void ema_update(const Plan& plan, uint64_t found_inf, uint64_t stream) {
  if (plan.chunks == 0) return;
  multi_tensor_ema<<<plan.chunks, THREADS, 0, stream_of(stream)>>>(plan, reinterpret_cast<const float*>(found_inf));
  check_launch("ema");
}

}  // namespace cuda
}  // namespace dino_fast
