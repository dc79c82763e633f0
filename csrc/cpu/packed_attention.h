// Attention within sequences that lie one after the other; the mathematics is in dino_fast/ops/packed_attention/__init__.py.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace dino_fast {

enum class Float : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// Sequence s is the tokens from ends[s] up to ends[s + 1]. Row (token, part, head) of qkv, `width` contiguous elements,
// begins at token * token_stride + part * part_stride + head * head_stride; those of all else lie without gaps.
struct Sequences {
  const void* qkv;
  int64_t token_stride, part_stride, head_stride;  // in elements
  const int32_t* ends;                             // [count + 1]
  int64_t count, tokens, heads, width;
  Float dtype;  // of qkv, out and both gradients
};

}  // namespace dino_fast

DINO_FAST_DECLARE(
  // out [tokens, heads, width], logsumexp [heads, tokens].
  void packed_attention_forward(const ::dino_fast::Sequences& sequences, void* out, float* logsumexp, int threads);
  // gradient [tokens, 3, heads, width] from that of the output, [tokens, heads, width].
  void packed_attention_backward(const ::dino_fast::Sequences& sequences, const void* grad_out, void* gradient,
                                 int threads);
)
