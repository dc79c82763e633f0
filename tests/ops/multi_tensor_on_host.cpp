// The CUDA kernels' block bodies as loops on the host: blocks one after another, the threads of a block in phases.
#define DINO_FAST_COUNT_BYTES
#include <cmath>
namespace dino_fast {  // the float overloads that CUDA has in the global namespace
using std::fma;
using std::sqrt;
}  // namespace dino_fast
#include "cuda/multi_tensor_blocks.h"

namespace dino_fast {
namespace cuda {
uint64_t bytes_moved = 0;
}
}  // namespace dino_fast

using namespace dino_fast::cuda;

extern "C" {

uint64_t take_bytes_moved() {
  const uint64_t bytes = bytes_moved;
  bytes_moved = 0;
  return bytes;
}

int64_t chunk_elements() { return CHUNK; }

void table_offsets(uint32_t tensors, uint32_t chunks, uint64_t* out) {
  const Offsets at = offsets(tensors, chunks);
  const uint64_t values[] = {at.hyper, at.gradients, at.entries, at.bytes};
  std::memcpy(out, values, sizeof values);
}

void upload(uint64_t address, const char* bytes, uint64_t size) {
  std::memcpy(reinterpret_cast<void*>(address), bytes, size);
}

void fill_chunks(uint64_t base, uint32_t tensors, uint32_t chunks) {
  for (uint32_t i = 0; i < chunks; ++i) fill_chunk(Plan{base, tensors, chunks}, i);
}

// Backwards where asked: the result must not depend on the order in which blocks come.
void norms(uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t to, int backwards) {
  static Scratch scratch;
  for (uint32_t i = 0; i < chunks; ++i)
    norms_block(Plan{base, tensors, chunks}, reinterpret_cast<float*>(to), backwards ? chunks - 1 - i : i, scratch);
}

void adamw_ema(uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t multipliers, uint64_t found_inf) {
  const Plan plan{base, tensors, chunks};
  for (uint32_t i = 0; i < tensors; ++i)
    prepare_tensor(plan, reinterpret_cast<const float*>(multipliers), reinterpret_cast<const float*>(found_inf), i);
  for (uint32_t i = 0; i < chunks; ++i) update_block(plan, i);
}

void ema_update(uint64_t base, uint32_t tensors, uint32_t chunks, uint64_t found_inf) {
  for (uint32_t i = 0; i < chunks; ++i)
    ema_block(Plan{base, tensors, chunks}, reinterpret_cast<const float*>(found_inf), i);
}
}
