// Float32 matrix products by AMX, whose tile unit multiplies bfloat16 alone but at many times the vector unit's rate.
//
// A float32 is the sum of three bfloat16 to 2^-25 of itself: x1 = bf16(x), x2 = bf16(x - x1), x3 = bf16(x - x1 - x2),
// both differences exact. Of the nine products of parts the six of order 2^-16 and above are made,
//
//   a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1) + O(2^-25 |a b|),
//
// each exact in float32 and summed there, so that the result is as good as that of float32 arithmetic.
//
// Operands are packed in blocks of 16 rows of A (or columns of B) by 32 of K, one tile of 1 KB a part. Within a tile
// k and k + 16 lie side by side, in A and in B alike: pairs are what the unit takes, and these are two vectors as they
// come from memory. The operand with fewer rows is packed whole, for as much of K as keeps it in a core's L2 cache; the
// other one is cut into blocks, each packed and multiplied by one task.
#include "cpu/matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/parallel.h"

#ifdef DINO_FAST_HAS_amx
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dino_fast {

#ifdef DINO_FAST_HAS_amx
namespace {

constexpr int64_t kSide = 16;              // rows of a tile
constexpr int64_t kDepth = 32;             // of K in a tile
constexpr int64_t kTile = kSide * kDepth;  // bfloat16 in a tile, 1 KB
constexpr int64_t kSums = kSide * kSide;   // float32 in a tile of C, 1 KB
constexpr int64_t kParts = 3;
constexpr int64_t kPanel = 2 * kSide;      // rows of A, or columns of B, that are multiplied at once
constexpr int64_t kTilesInL1 = 4;          // of K: 24 KB of each operand; 6 took a third longer, 3 as long

constexpr int64_t kShared = 1 << 20;       // bytes in L2 of the operand that is packed whole
constexpr int64_t kMostRows = 768;         // of that operand
constexpr int64_t kOfTask = 1 << 19;       // bytes of the other one, where a task packs its block at once
constexpr int64_t kMostPanels = 8;         // of the other one in a task
constexpr int64_t kSumsOfTask = 3 << 15;   // floats in L2

constexpr int64_t kSlice = 1024;           // of a long K
constexpr int64_t kMostSlices = 16;
constexpr int64_t kSumsOfSlices = 1 << 22; // floats
constexpr int64_t kLongSide = 768;         // of a chunk of C whose sums stay in L2 over a slice
constexpr int64_t kShortSide = 256;

const char* find_unavailable_reason() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) {
    return "this processor has no AMX";
  }
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return "this processor has no AVX512_BF16";
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData)) return "the system does not give leave to use AMX";
  return nullptr;
}

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- packing ----

// 16 pairs (x0[i], x1[i]) as bfloat16 of the three parts.
inline void split(__m512 x0, __m512 x1, __m512i* parts) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int part = 0; part < kParts; ++part) {
    const __m512i pairs = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
    parts[part] = pairs;
    x0 = _mm512_sub_ps(x0, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    x1 = _mm512_sub_ps(x1, _mm512_castsi512_ps(_mm512_and_si512(pairs, high)));
  }
}

inline void transpose(__m512i* x) {  // 16 vectors of 16
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// An operand seen from the sums: `outer` rows of A or columns of B, `inner` of K.
struct Operand {
  const float* data;
  int64_t outer, outer_stride, inner_stride;
  bool rows_in_tile;  // a tile's rows are those of A; else they are pairs of K, as B's must be
};

// Vectors i = 0 .. 15 of a block: along K, row i, whose lanes are pairs of K; else pair i of K, whose lanes are rows.
template <bool Whole>
inline void split_vector(const Operand& x, const float* from, int i, int64_t width, int64_t depth, __m512i* parts) {
  __m512 x0 = _mm512_setzero_ps(), x1 = x0;
  if (x.inner_stride == 1) {
    const float* at = from + i * x.outer_stride;
    if (Whole) {
      x0 = _mm512_loadu_ps(at);
      x1 = _mm512_loadu_ps(at + 16);
    } else if (i < width) {
      x0 = _mm512_maskz_loadu_ps(lanes(depth), at);
      x1 = _mm512_maskz_loadu_ps(lanes(depth - 16), at + 16);
    }
  } else {
    const float* at = from + i * x.inner_stride;
    if (Whole) {
      x0 = _mm512_loadu_ps(at);
      x1 = _mm512_loadu_ps(at + 16 * x.inner_stride);
    } else {
      if (i < depth) x0 = _mm512_maskz_loadu_ps(lanes(width), at);
      if (i + 16 < depth) x1 = _mm512_maskz_loadu_ps(lanes(width), at + 16 * x.inner_stride);
    }
  }
  split(x0, x1, parts);
}

// One block of 16 by 32, from (outer, inner) on, of which `depth` of K exist.
template <bool Whole>
inline void pack_block(const Operand& x, int64_t outer, int64_t inner, int64_t depth, uint16_t* to) {
  const float* from = x.data + outer * x.outer_stride + inner * x.inner_stride;
  const int64_t width = x.outer - outer;
  __m512i parts[kParts];
  if ((x.inner_stride == 1) == x.rows_in_tile) {  // as they lie
    for (int i = 0; i < 16; ++i) {
      split_vector<Whole>(x, from, i, width, depth, parts);
      for (int part = 0; part < kParts; ++part) _mm512_store_si512(to + part * kTile + i * kDepth, parts[part]);
    }
    return;
  }
  alignas(64) __m512i vectors[kParts][16];
  for (int i = 0; i < 16; ++i) {
    split_vector<Whole>(x, from, i, width, depth, parts);
    for (int part = 0; part < kParts; ++part) vectors[part][i] = parts[part];
  }
  for (int part = 0; part < kParts; ++part) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = vectors[part][i];
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + part * kTile + i * kDepth, rows[i]);
  }
}

inline void pack_tile(const Operand& x, int64_t outer, int64_t inner, int64_t depth, uint16_t* to) {
  if (depth >= kDepth && x.outer - outer >= kSide) pack_block<true>(x, outer, inner, depth, to);
  else pack_block<false>(x, outer, inner, depth, to);
}

// Tiles from `outer` up to `end`, for `depth` of K from `inner` on; rows of tiles are `row` apart.
void pack(const Operand& x, int64_t outer, int64_t end, int64_t inner, int64_t depth, uint16_t* to, int64_t row) {
  const int64_t tiles = up(depth, kDepth) / kDepth;
  const auto tile = [&](int64_t i, int64_t k) {
    pack_tile(x, outer + i * kSide, inner + k * kDepth, depth - k * kDepth, to + i * row + k * kParts * kTile);
  };
  const int64_t rows = (end - outer) / kSide;
  if (x.inner_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < tiles; ++k) tile(i, k);
    }
  } else {  // in the order in which the numbers lie, of which the next ones are asked for
    for (int64_t k = 0; k < tiles; ++k) {
      const float* next = x.data + outer * x.outer_stride + (inner + (k + 1) * kDepth) * x.inner_stride;
      const int64_t left = std::min(depth - (k + 1) * kDepth, kDepth);
      for (int64_t i = 0; i < rows; ++i) {
        const float* line = next + i * kSide;
        for (int64_t j = 0; j < left; ++j, line += x.inner_stride) {
          _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
        }
        tile(i, k);
      }
    }
  }
}

// The lines of memory that the next panel will be packed from, asked for while this one is multiplied.
struct Ahead {
  const char* line = nullptr;
  int64_t stride = 0, rows = 0, lines = 0, at = 0, each = 0;

  Ahead() = default;
  Ahead(const Operand& x, int64_t outer, int64_t inner, int64_t depth, int64_t steps) {
    if (outer >= x.outer) return;
    const int64_t height = std::min(kPanel, x.outer - outer);
    line = reinterpret_cast<const char*>(x.data + outer * x.outer_stride + inner * x.inner_stride);
    stride = x.outer_stride * static_cast<int64_t>(sizeof(float));
    rows = height;
    lines = (depth * static_cast<int64_t>(sizeof(float)) + 63) / 64;
    each = (rows * lines + steps - 1) / steps;
  }
  void fetch() {
    for (int64_t n = 0; n < each && rows; ++n) {
      _mm_prefetch(line + at * 64, _MM_HINT_T1);
      if (++at == lines) {
        at = 0;
        line += stride;
        --rows;
      }
    }
  }
};

// ---- multiplying ----

struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // bytes
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The product of two rows of tiles of each, over `tiles` of K: C in tiles 0 to 3, A in 4 and 5, B in 6 and 7. `row_a`
// and `row_b` are what lies between rows of tiles.
#define LOAD_A(part)                      \
  _tile_loadd(4, a + (part) * kTile, 64); \
  _tile_loadd(5, a + row_a + (part) * kTile, 64)
#define LOAD_B(part)                      \
  _tile_loadd(6, b + (part) * kTile, 64); \
  _tile_loadd(7, b + row_b + (part) * kTile, 64)
#define MULTIPLY()         \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

inline void multiply_panels(const uint16_t* a, int64_t row_a, const uint16_t* b, int64_t row_b, int64_t tiles,
                            Ahead& ahead) {
  for (int64_t k = 0; k < tiles; ++k, a += kParts * kTile, b += kParts * kTile) {
    ahead.fetch();
    // The small ones first: what only has three parts to be put together is then exact.
    LOAD_A(2);
    LOAD_B(0);
    MULTIPLY();
    LOAD_A(1);
    MULTIPLY();
    LOAD_B(1);
    MULTIPLY();
    LOAD_A(0);
    MULTIPLY();
    LOAD_B(2);
    MULTIPLY();
    LOAD_B(0);
    MULTIPLY();
  }
}

// Sums of 32 by 32, row by row of their tiles: [2, 2, 16, 16]. `begin`: they start at zero.
inline void multiply_block(float* sums, bool begin, const uint16_t* a, int64_t row_a, const uint16_t* b, int64_t row_b,
                           int64_t tiles, Ahead& ahead) {
  constexpr int64_t kRow = kSide * sizeof(float);
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + kSums, kRow);
    _tile_loadd(2, sums + 2 * kSums, kRow);
    _tile_loadd(3, sums + 3 * kSums, kRow);
  }
  multiply_panels(a, row_a, b, row_b, tiles, ahead);
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kSums, kRow);
  _tile_stored(2, sums + 2 * kSums, kRow);
  _tile_stored(3, sums + 3 * kSums, kRow);
}

struct Sums {
  float* c;
  int64_t row, M, N;
  const float* bias;  // [N], added once
};

// One row of a block of sums to (i, j) of C: `add` to what is there, else with the bias.
inline void write_row(const Sums& out, int64_t i, int64_t j, bool add, const float* sums) {
  float* c = out.c + i * out.row + j;
  for (int64_t half = 0; half < 2; ++half, c += kSide, sums += kSums) {
    const __mmask16 mask = lanes(out.N - j - half * kSide);
    __m512 value = _mm512_load_ps(sums);
    if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, c));
    else if (out.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, out.bias + j + half * kSide));
    _mm512_mask_storeu_ps(c, mask, value);
  }
}

// Rows [top, top + height) of `across` blocks from column `left` on; from block to block of `sums` it is `down_step`
// floats down and `across_step` across.
void write_sums(const Sums& out, int64_t top, int64_t height, int64_t left, int64_t across, int64_t down_step,
           int64_t across_step, bool add, const float* sums) {
  for (int64_t i = 0; i < std::min(height, out.M - top); ++i) {
    const float* from = sums + i / kPanel * down_step + i % kPanel / kSide * 2 * kSums + i % kSide * kSide;
    for (int64_t j = 0; j < across; ++j) write_row(out, top + i, left + j * kPanel, add, from + j * across_step);
  }
}

// Memory of this thread, kept from call to call.
template <typename T, int Which> T* room(int64_t count) {
  constexpr std::align_val_t kLine{64};
  thread_local std::unique_ptr<T, void (*)(T*)> memory{nullptr, [](T* p) { ::operator delete(p, kLine); }};
  thread_local int64_t size = 0;
  if (size < count) {
    size = 0;  // where there is no memory for more, the next call finds none
    memory.reset();
    memory.reset(static_cast<T*>(::operator new(count * sizeof(T), kLine)));
    size = count;
  }
  return memory.get();
}

// C from the columns [inner, inner + depth) of K; `small` is packed whole, `large` in blocks of panels.
void multiply_stretch(const Operand& small, const Operand& large, bool large_is_a, int64_t block, int64_t inner,
                      int64_t depth, bool add, const Sums& out, int threads) {
  const int64_t tiles = up(depth, kDepth) / kDepth, row = tiles * kParts * kTile;
  const int64_t panels = up(large.outer, kPanel) / kPanel, others = up(small.outer, kPanel) / kPanel;
  uint16_t* packed = room<uint16_t, 0>(others * 2 * row);
  if (small.inner_stride == 1) {
    parallel_for(others, threads, [&](int64_t task) {
      pack(small, task * kPanel, (task + 1) * kPanel, inner, depth, packed + task * 2 * row, row);
    });
  } else {
    parallel_for((tiles + kTilesInL1 - 1) / kTilesInL1, threads, [&](int64_t task) {
      const int64_t tile = task * kTilesInL1, from = tile * kDepth, count = std::min(depth - from, kTilesInL1 * kDepth);
      pack(small, 0, others * kPanel, inner + from, count, packed + tile * kParts * kTile, row);
    });
  }
  // As many columns of the packed as L1 holds of two rows of tiles of each operand, evenly.
  const int64_t parts = (tiles + kTilesInL1 - 1) / kTilesInL1, part = (tiles + parts - 1) / parts;
  const bool whole_block = large.inner_stride != 1;  // packed at once, for the sake of longer rows
  parallel_for((panels + block - 1) / block, threads, [&](int64_t task) {
    const int64_t first_panel = task * block, end = std::min(first_panel + block, panels);
    uint16_t* mine = room<uint16_t, 1>((whole_block ? block : 1) * 2 * row);
    float* sums = room<float, 2>(block * others * 4 * kSums);
    if (whole_block) pack(large, first_panel * kPanel, end * kPanel, inner, depth, mine, row);
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    const auto multiply = [&](int64_t panel, int64_t k, const uint16_t* packed_panel, Ahead& ahead) {
      float* to = sums + (panel - first_panel) * others * 4 * kSums;
      for (int64_t other = 0; other < others; ++other) {
        const uint16_t *here = packed_panel + k * kParts * kTile, *there = packed + other * 2 * row + k * kParts * kTile;
        multiply_block(to + other * 4 * kSums, k == 0, large_is_a ? here : there, row, large_is_a ? there : here, row,
                       std::min(part, tiles - k), ahead);
      }
    };
    if (whole_block) {
      Ahead nothing;
      for (int64_t k = 0; k < tiles; k += part) {
        for (int64_t panel = first_panel; panel < end; ++panel) {
          multiply(panel, k, mine + (panel - first_panel) * 2 * row, nothing);
        }
      }
    } else {
      for (int64_t panel = first_panel; panel < end; ++panel) {
        pack(large, panel * kPanel, (panel + 1) * kPanel, inner, depth, mine, row);
        Ahead ahead(large, (panel + 1) * kPanel, inner, depth, others * tiles);
        for (int64_t k = 0; k < tiles; k += part) multiply(panel, k, mine, ahead);
      }
    }
    _tile_release();
    const int64_t begin = first_panel * kPanel, count = end - first_panel, panel_size = others * 4 * kSums;
    if (large_is_a) write_sums(out, begin, count * kPanel, 0, others, panel_size, 4 * kSums, add, sums);
    else write_sums(out, 0, others * kPanel, begin, count, 4 * kSums, panel_size, add, sums);
  });
}

// C from a long K: cut into slices, as many however many threads there are, of each of which one task makes all sums,
// or those of a chunk of C that lies in L2 with what is packed for it. The slices' sums are then added up in order.
void multiply_slices(const Operand& a, const Operand& b, int64_t K, bool add, const Sums& out, int threads) {
  const bool tall = a.outer >= b.outer;
  const int64_t most_down = tall ? kLongSide : kShortSide, most_across = tall ? kShortSide : kLongSide;
  const int64_t down = (out.M + most_down - 1) / most_down, across = (out.N + most_across - 1) / most_across;
  const int64_t height = up((out.M + down - 1) / down, kPanel), width = up((out.N + across - 1) / across, kPanel);
  const int64_t most = std::min(kMostSlices, std::max<int64_t>(1, kSumsOfSlices / (out.M * out.N)));
  const int64_t slices = std::min((K + kSlice - 1) / kSlice, most), length = up((K + slices - 1) / slices, kDepth);
  const int64_t depth = std::max(kShared * 3 / 4 / ((height + width) * kParts * 2) / kDepth, int64_t{1}) * kDepth;
  const int64_t size = height * width;  // of a chunk's sums
  float* partial = room<float, 3>(slices * down * across * size);
  parallel_for(slices * down * across, threads, [&](int64_t task) {
    const int64_t slice = task / (down * across), chunk = task % (down * across);
    const int64_t top = chunk / across * height, left = chunk % across * width;
    const int64_t panels = up(std::min(height, out.M - top), kPanel) / kPanel;
    const int64_t others = up(std::min(width, out.N - left), kPanel) / kPanel;
    float* sums = partial + task * size;
    uint16_t* packed_a = room<uint16_t, 1>((height + width) * depth * kParts);
    uint16_t* packed_b = packed_a + height * depth * kParts;
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    Ahead nothing;
    const int64_t end = std::min((slice + 1) * length, K);
    for (int64_t inner = slice * length; inner < end; inner += depth) {
      const int64_t here = std::min(depth, end - inner), tiles = up(here, kDepth) / kDepth;
      const int64_t row = tiles * kParts * kTile;
      pack(a, top, top + panels * kPanel, inner, here, packed_a, row);
      pack(b, left, left + others * kPanel, inner, here, packed_b, row);
      const int64_t parts = (tiles + kTilesInL1 - 1) / kTilesInL1, part = (tiles + parts - 1) / parts;
      for (int64_t k = 0; k < tiles; k += part) {
        const bool begin = inner == slice * length && k == 0;
        const uint16_t *here_a = packed_a + k * kParts * kTile, *here_b = packed_b + k * kParts * kTile;
        for (int64_t i = 0; i < panels; ++i) {
          for (int64_t j = 0; j < others; ++j) {
            float* block_sums = sums + (i * others + j) * 4 * kSums;
            multiply_block(block_sums, begin, here_a + i * 2 * row, row, here_b + j * 2 * row, row,
                           std::min(part, tiles - k), nothing);
          }
        }
      }
    }
    _tile_release();
  });
  const int64_t rows = up(out.M, kPanel) / kPanel;
  parallel_for(rows, threads, [&](int64_t panel) {
    for (int64_t chunk = 0; chunk < across; ++chunk) {
      const int64_t left = chunk * width, others = up(std::min(width, out.N - left), kPanel) / kPanel;
      const int64_t above = panel * kPanel / height, inside = panel - above * height / kPanel;
      float* sums = partial + (above * across + chunk) * size + inside * others * 4 * kSums;
      for (int64_t slice = 1; slice < slices; ++slice) {
        const float* more = sums + slice * down * across * size;
        for (int64_t n = 0; n < others * 4 * kSums; n += 16) {
          _mm512_store_ps(sums + n, _mm512_add_ps(_mm512_load_ps(sums + n), _mm512_load_ps(more + n)));
        }
      }
      write_sums(out, panel * kPanel, kPanel, left, others, 0, 4 * kSums, add, sums);
    }
  });
}

}  // namespace

const char* matmul_unavailable_reason() {
  static const char* const reason = find_unavailable_reason();
  return reason;
}

void matmul(const Matrix& a, const Matrix& b, const float* bias, bool add, float* c, int64_t c_row, int threads) {
  const int64_t M = a.rows, N = b.columns, K = a.columns;
  const Operand a_operand{a.data, M, a.row_stride, a.column_stride, true};
  const Operand b_operand{b.data, N, b.column_stride, b.row_stride, false};
  if (K >= 4 * std::max(M, N) && K >= kSlice) {
    return multiply_slices(a_operand, b_operand, K, add, {c, c_row, M, N, bias}, threads);
  }
  const bool large_is_a = M >= N;
  const int64_t slices = (std::min(M, N) + kMostRows - 1) / kMostRows;  // of the small one
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t length = up((std::min(M, N) + slices - 1) / slices, kPanel), from = slice * length;
    const int64_t rows = std::min(length, std::min(M, N) - from);
    const Operand& large = large_is_a ? a_operand : b_operand;
    Operand small = large_is_a ? b_operand : a_operand;
    small.data += from * small.outer_stride;
    small.outer = rows;
    const Sums out = large_is_a ? Sums{c + from, c_row, M, rows, bias ? bias + from : nullptr}
                                : Sums{c + from * c_row, c_row, rows, N, bias};
    const int64_t panels = up(std::max(M, N), kPanel) / kPanel, others = up(rows, kPanel) / kPanel;
    const int64_t fit = std::min(kMostPanels, std::max<int64_t>(1, kSumsOfTask / (others * 4 * kSums)));
    const bool whole_block = large.inner_stride != 1;
    const int64_t tasks = (whole_block ? 1 : 4) * std::max(threads, 1);
    const int64_t block = std::max<int64_t>(1, std::min(fit, (panels + tasks - 1) / tasks));
    // Stretches of K of as equal lengths as keep what is packed in the cache.
    const int64_t bytes = kPanel * kParts * 2 * (whole_block ? std::min(fit, panels) : others);
    const int64_t most = std::max((whole_block ? kOfTask : kShared) / bytes / kDepth, kTilesInL1) * kDepth;
    const int64_t stretches = std::max<int64_t>(1, (K + most - 1) / most);
    const int64_t depth = up((K + stretches - 1) / stretches, kDepth);
    for (int64_t inner = 0; inner < K; inner += depth) {
      const int64_t here = std::min(depth, K - inner);
      multiply_stretch(small, large, large_is_a, block, inner, here, add || inner > 0, out, threads);
    }
  }
}

#else

const char* matmul_unavailable_reason() {
  return "this build has no AMX: it needs Linux on x86-64 and a compiler that knows -mamx-bf16";
}

void matmul(const Matrix&, const Matrix&, const float*, bool, float*, int64_t, int) {}

#endif

}  // namespace dino_fast
