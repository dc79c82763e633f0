// Launchers of the CUDA multi_tensor kernels: raw addresses and a stream; all work is queued, nothing waited for.
//
// A plan is one block of device memory that the caller owns: hyper-parameters, gradient addresses, tensor addresses,
// chunk table and scratch, at the offsets that `offsets_of` returns. The caller allocates it zeroed, writes the first
// three with `upload` (later only those that changed) and calls `fill_chunks` once. Addresses are 64 bits, 0 where absent.
// Launchers throw std::runtime_error with CUDA's own text.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dino_fast {
namespace cuda {

struct Plan {
  uint64_t base;     // device address, 16-byte aligned
  uint32_t tensors;  // rows of the tables
  uint32_t chunks;   // sum over tensors of ceil(elements / CHUNK)
};

struct Offsets {
  uint64_t hyper;      // Hyper, then [tensors] Rates
  uint64_t gradients;  // [tensors] Gradient
  uint64_t entries;    // [tensors] Entry
  uint64_t factors, tickets, partials, chunks;
  uint64_t bytes;
};

Offsets offsets_of(uint32_t tensors, uint32_t chunks);
int64_t chunk_elements();

// Bytes travel as kernel arguments: right in a captured graph, and no pinned memory is needed. size % 8 == 0.
void upload(uint64_t address, const char* bytes, size_t size, uint64_t stream);
void fill_chunks(const Plan& plan, uint64_t stream);

// 2-norms of the gradients to float32 [tensors]; those of empty tensors are not written.
void norms(const Plan& plan, uint64_t to, uint64_t stream);

// AdamW, EMA and copies. multipliers: float32 [tensors] or 0, each gradient is multiplied by its own. found_inf: float32
// scalar or 0; where it is positive, weights, moments and step counts stay; where it is infinite, everything does. Both
// are read on the device.
void adamw_ema(const Plan& plan, uint64_t multipliers, uint64_t found_inf, uint64_t stream);

// EMA and copies of the teacher alone; nothing where the float32 scalar found_inf (or 0) is infinite.
void ema_update(const Plan& plan, uint64_t found_inf, uint64_t stream);

}  // namespace cuda
}  // namespace dino_fast
