// The work of one block of each multi_tensor kernel. Plain C++ with CUDA's qualifiers: on the device a block is 256
// threads, in the tests it is a loop over them.
//
// The arithmetic of an element is multi_tensor_math.h, shared with the CPU. All of it happens in one pass: g, p, m1, m2
// and the teacher are read once; p, m1, m2, the teacher and the bfloat16 copies written once.
//
// Bytes an element, e_x = size of x; each copy that is kept adds 2:
//   norms   e_g
//   update  e_g + 24 + 8            (8: the teacher's)
//           4 + 8                   after an overflow, 0 where found_inf is infinite
//   ema     e_student + 2 e_teacher
// FLOPs an element, a fused multiply-add being two: update 18, ema 3, norms 2, far below the chip's rate
// while the bytes move.
#pragma once

#include "cuda/multi_tensor_tables.h"

namespace dino_fast {
namespace cuda {

// ---- memory shared between blocks of one launch ----

// Written by another block of this launch: L1 may hold an older line.
template <class T>
DINO_FAST_BOTH T load_of_other_block(const T* from) {
#ifdef __CUDA_ARCH__
  return __ldcg(from);
#else
  return *from;
#endif
}

// The number of blocks that came before; this thread's earlier writes are visible to those that come later.
DINO_FAST_BOTH uint32_t take_ticket(uint32_t* tickets) {
#ifdef __CUDA_ARCH__
  __threadfence();
  const uint32_t ticket = atomicAdd(tickets, 1u);
  __threadfence();
  return ticket;
#else
  return (*tickets)++;
#endif
}

struct Scratch {  // of a block
  double sums[THREADS];
  uint32_t ticket;
};

// sums[0] = their sum, always added in the same order
DINO_FAST_BOTH void add_up(Scratch& scratch) {
  DINO_FAST_SYNC();
#pragma unroll 1
  for (uint32_t half = THREADS / 2; half > 0; half /= 2) {
    DINO_FAST_EACH_THREAD(thread) {
      if (thread < half) scratch.sums[thread] += scratch.sums[thread + half];
    }
    DINO_FAST_SYNC();
  }
}

// ---- norms ----

template <class G>
struct SumSquares {
  const G* gradient;
  float sums[VECTOR] = {};  // independent chains

  template <int N>
  DINO_FAST_BOTH void at(uint32_t i) {
    float g[N];
    load<N>(gradient, i, g);
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += g[k] * g[k];
  }
};

template <class G>
DINO_FAST_BOTH double sum_squares(const Gradient& gradient, int64_t begin, uint32_t length, uint32_t thread) {
  SumSquares<G> work{reinterpret_cast<const G*>(gradient.address) + begin};
  Stretch stretch{length, -1};
  stretch.add(work.gradient);
  walk<4>(stretch, thread, work);
  return double(work.sums[0] + work.sums[1]) + double(work.sums[2] + work.sums[3]);
}

DINO_FAST_BOTH uint32_t chunk_length(const Entry& entry, const Chunk& chunk) {
  const int64_t rest = entry.count - chunk.index * CHUNK;
  return uint32_t(rest < CHUNK ? rest : CHUNK);
}

// The block's part of a tensor's norm; the block that comes last for a tensor adds the parts in the order of its chunks.
DINO_FAST_BOTH void norms_block(const Plan& plan, float* norms, uint32_t block, Scratch& scratch) {
  const Tables tables = tables_of(plan);
  const Chunk chunk = tables.chunks[block];
  const Entry& entry = tables.entries[chunk.tensor];
  const Gradient gradient = tables.gradients[chunk.tensor];
  const int64_t begin = chunk.index * CHUNK;
  const uint32_t length = chunk_length(entry, chunk);
  DINO_FAST_EACH_THREAD(thread) {
    double sum = 0.0;
    if (gradient.kind == FLOAT32) sum = sum_squares<float>(gradient, begin, length, thread);
    if (gradient.kind == BFLOAT16) sum = sum_squares<bfloat16>(gradient, begin, length, thread);
    if (gradient.kind == FLOAT16) sum = sum_squares<float16>(gradient, begin, length, thread);
    scratch.sums[thread] = sum;
  }
  add_up(scratch);
  DINO_FAST_EACH_THREAD(thread) {
    if (thread == 0) {
      tables.partials[block] = scratch.sums[0];
      scratch.ticket = take_ticket(&tables.tickets[chunk.tensor]);
    }
  }
  DINO_FAST_SYNC();
  const uint32_t chunks = uint32_t((entry.count + CHUNK - 1) / CHUNK);
  if (scratch.ticket + 1 != chunks) return;

  DINO_FAST_EACH_THREAD(thread) {
    double sum = 0.0;
    for (uint32_t i = thread; i < chunks; i += THREADS)
      sum += load_of_other_block(&tables.partials[entry.first_chunk + i]);
    scratch.sums[thread] = sum;
  }
  add_up(scratch);
  DINO_FAST_EACH_THREAD(thread) {
    if (thread == 0) {
      norms[chunk.tensor] = float(sqrt(scratch.sums[0]));
      tables.tickets[chunk.tensor] = 0;
    }
  }
}

// ---- factors of the step ----

DINO_FAST_BOTH void prepare_tensor(const Plan& plan, const float* multipliers, const float* found_inf,
                                   uint32_t tensor) {
  const Tables tables = tables_of(plan);
  const Hyper& hyper = *tables.hyper;
  Factors factors = {};
  factors.ema = ema_scalars(hyper.momentum);
  if (found_inf == nullptr || !(*found_inf > 0.0f)) {
    float* const counter = reinterpret_cast<float*>(tables.entries[tensor].step);
    const float step = *counter + 1.0f;
    *counter = step;
    const Rates& rates = tables.rates[tensor];
    factors.adamw = adamw_scalars(step, rates.lr, rates.weight_decay, hyper.beta1, hyper.beta2, hyper.eps,
                                  multipliers == nullptr ? 1.0f : multipliers[tensor]);
    factors.update = 1;
  } else if (holds_all(found_inf)) {
    factors.update = NOTHING;
  }
  tables.factors[tensor] = factors;
}

// ---- update ----

template <class G>
struct Update {
  const Factors& factors;
  const G* gradient;
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  float* teacher;
  bfloat16* param_copy;
  bfloat16* teacher_copy;

  template <int N>
  DINO_FAST_BOTH void at(uint32_t i) {
    float g[N], p[N], m[N], v[N], t[N] = {};
    load<N>(param, i, p);
    load<N>(exp_avg, i, m);
    load<N>(exp_avg_sq, i, v);
    if (teacher != nullptr) load<N>(teacher, i, t);
    load<N>(gradient, i, g);
#pragma unroll
    for (int k = 0; k < N; ++k) adamw_element(factors.adamw, g[k], p[k], m[k], v[k]);
    store<N>(param, i, p);
    store<N>(exp_avg, i, m);
    store<N>(exp_avg_sq, i, v);
    if (param_copy != nullptr) store<N>(param_copy, i, p);
    if (teacher == nullptr) return;
#pragma unroll
    for (int k = 0; k < N; ++k) t[k] = ema_element(factors.ema, t[k], p[k]);
    store<N>(teacher, i, t);
    if (teacher_copy != nullptr) store<N>(teacher_copy, i, t);
  }
};

template <class S, class T>
struct Ema {
  const EmaScalars& scalars;
  const S* student;
  T* teacher;
  bfloat16* param_copy;
  bfloat16* teacher_copy;

  template <int N>
  DINO_FAST_BOTH void at(uint32_t i) {
    float s[N], t[N];
    load<N>(student, i, s);
    if (param_copy != nullptr) store<N>(param_copy, i, s);
    if (teacher == nullptr) return;
    load<N>(teacher, i, t);
#pragma unroll
    for (int k = 0; k < N; ++k) t[k] = ema_element(scalars, t[k], s[k]);
    store<N>(teacher, i, t);
    if (teacher_copy != nullptr) store<N>(teacher_copy, i, t);
  }
};

// ---- one chunk, from kinds to types ----

template <class T>
DINO_FAST_BOTH T* at_element(uint64_t address, int64_t i) {
  return address == 0 ? nullptr : reinterpret_cast<T*>(address) + i;
}

template <class G>
DINO_FAST_BOTH void update_chunk(const Entry& entry, uint64_t gradient, const Factors& factors, int64_t begin,
                                 uint32_t length) {
  Update<G> work{factors,
                 at_element<G>(gradient, begin),
                 at_element<float>(entry.param, begin),
                 at_element<float>(entry.exp_avg, begin),
                 at_element<float>(entry.exp_avg_sq, begin),
                 at_element<float>(entry.teacher, begin),
                 at_element<bfloat16>(entry.param_copy, begin),
                 at_element<bfloat16>(entry.teacher_copy, begin)};
  Stretch stretch{length, -1};
  stretch.add(work.gradient);
  stretch.add(work.param);
  stretch.add(work.exp_avg);
  stretch.add(work.exp_avg_sq);
  stretch.add(work.teacher);
  stretch.add(work.param_copy);
  stretch.add(work.teacher_copy);
  DINO_FAST_EACH_THREAD(thread) { walk<1>(stretch, thread, work); }
}

template <class S, class T>
DINO_FAST_BOTH void ema_chunk(const Entry& entry, const EmaScalars& scalars, int64_t begin, uint32_t length) {
  Ema<S, T> work{scalars,
                 at_element<S>(entry.param, begin),
                 at_element<T>(entry.teacher, begin),
                 at_element<bfloat16>(entry.param_copy, begin),
                 at_element<bfloat16>(entry.teacher_copy, begin)};
  if (work.teacher == nullptr && work.param_copy == nullptr) return;
  Stretch stretch{length, -1};
  stretch.add(work.student);
  stretch.add(work.teacher);
  stretch.add(work.param_copy);
  stretch.add(work.teacher_copy);
  DINO_FAST_EACH_THREAD(thread) { walk<1>(stretch, thread, work); }
}

template <class S>
DINO_FAST_BOTH void ema_chunk(const Entry& entry, const EmaScalars& scalars, int64_t begin, uint32_t length) {
  if (entry.teacher_kind == BFLOAT16) return ema_chunk<S, bfloat16>(entry, scalars, begin, length);
  if (entry.teacher_kind == FLOAT16) return ema_chunk<S, float16>(entry, scalars, begin, length);
  ema_chunk<S, float>(entry, scalars, begin, length);
}

// ---- the blocks ----

DINO_FAST_BOTH void update_block(const Plan& plan, uint32_t block) {
  const Tables tables = tables_of(plan);
  const Chunk chunk = tables.chunks[block];
  const Entry& entry = tables.entries[chunk.tensor];
  const Gradient gradient = tables.gradients[chunk.tensor];
  const Factors factors = tables.factors[chunk.tensor];
  const int64_t begin = chunk.index * CHUNK;
  const uint32_t length = chunk_length(entry, chunk);
  if (factors.update == NOTHING) return;
  if (!factors.update) return ema_chunk<float, float>(entry, factors.ema, begin, length);
  if (gradient.kind == BFLOAT16) return update_chunk<bfloat16>(entry, gradient.address, factors, begin, length);
  if (gradient.kind == FLOAT16) return update_chunk<float16>(entry, gradient.address, factors, begin, length);
  update_chunk<float>(entry, gradient.address, factors, begin, length);
}

DINO_FAST_BOTH void ema_block(const Plan& plan, const float* found_inf, uint32_t block) {
  if (holds_all(found_inf)) return;
  const Tables tables = tables_of(plan);
  const Chunk chunk = tables.chunks[block];
  const Entry& entry = tables.entries[chunk.tensor];
  const int64_t begin = chunk.index * CHUNK;
  const uint32_t length = chunk_length(entry, chunk);
  const EmaScalars scalars = ema_scalars(tables.hyper->momentum);
  if (entry.param_kind == BFLOAT16) return ema_chunk<bfloat16>(entry, scalars, begin, length);
  if (entry.param_kind == FLOAT16) return ema_chunk<float16>(entry, scalars, begin, length);
  ema_chunk<float>(entry, scalars, begin, length);
}

// The tensor of a chunk: the last whose first chunk is not behind it. Empty tensors share their first chunk with the
// next and are passed over.
DINO_FAST_BOTH void fill_chunk(const Plan& plan, uint32_t block) {
  const Tables tables = tables_of(plan);
  uint32_t low = 0, high = plan.tensors - 1;
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (tables.entries[middle].first_chunk <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  tables.chunks[block] = {low, block - tables.entries[low].first_chunk};
}

}  // namespace cuda
}  // namespace dino_fast
