// Matrix products of operands that lie in a core's caches: C [M, N] = A [M, K] B [K, N], or added to what is there.
//
// Element (i, k) of A is at a[i * a_row + k * a_column], so that A may be a transpose; rows of B and C are contiguous.
// N is a multiple of the vector's width. Each block of C is kept in registers for all of K: one broadcast of A serves as
// many multiply-adds as the block is vectors wide, one vector of B as many as it is rows high.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace dino_fast {
namespace DINO_FAST_ISA {

#if defined(DINO_FAST_ISA_avx512)
constexpr int kBlockRows = 6, kBlockVectors = 4;  // 24 of 32 registers hold C
#elif defined(DINO_FAST_ISA_avx2)
constexpr int kBlockRows = 6, kBlockVectors = 2;  // 12 of 16
#else
constexpr int kBlockRows = 4, kBlockVectors = 1;
#endif

struct Operands {
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  int64_t K;
  bool add;
};

template <int Rows, int Vectors> DINO_FAST_INLINE void multiply_block(const Operands& x, int64_t i, int64_t j) {
  const float* a = x.a + i * x.a_row;
  const float* b = x.b + j;
  float* c = x.c + i * x.c_row + j;
  Vec sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = x.add ? load(c + r * x.c_row + v * Vec::width) : Vec(0.0f);
  }
  for (int64_t k = 0; k < x.K; ++k) {
    Vec b_vectors[Vectors];
    for (int v = 0; v < Vectors; ++v) b_vectors[v] = load(b + k * x.b_row + v * Vec::width);
    for (int r = 0; r < Rows; ++r) {
      const Vec a_element(a[r * x.a_row + k * x.a_column]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(a_element, b_vectors[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store(c + r * x.c_row + v * Vec::width, sums[r][v]);
  }
}

template <int Vectors> void multiply_columns(const Operands& x, int64_t M, int64_t j) {
  const int64_t blocks = (M + kBlockRows - 1) / kBlockRows;  // of as equal heights as there can be
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t i = M * block / blocks, rows = M * (block + 1) / blocks - i;
    switch (rows) {
      case 1: multiply_block<1, Vectors>(x, i, j); break;
      case 2: multiply_block<2, Vectors>(x, i, j); break;
      case 3: multiply_block<3, Vectors>(x, i, j); break;
      case 4: multiply_block<4, Vectors>(x, i, j); break;
      case 5: multiply_block<5, Vectors>(x, i, j); break;
      default: multiply_block<6, Vectors>(x, i, j); break;
    }
  }
}

inline void multiply(int64_t M, int64_t N, const Operands& x) {
  const int64_t vectors = N / Vec::width, blocks = (vectors + kBlockVectors - 1) / kBlockVectors;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = vectors * block / blocks, width = vectors * (block + 1) / blocks - first;
    const int64_t j = first * Vec::width;
    if (width == 1) multiply_columns<1>(x, M, j);
    else if (width == 2) multiply_columns<std::min(2, kBlockVectors)>(x, M, j);
    else if (width == 3) multiply_columns<std::min(3, kBlockVectors)>(x, M, j);
    else multiply_columns<kBlockVectors>(x, M, j);
  }
}

// to [columns, rows] = from [rows, columns]; both numbers are multiples of the vector's width.
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += Vec::width) {
    for (int64_t j = 0; j < columns; j += Vec::width) transpose_tile(from + i * columns + j, columns, to + j * rows + i, rows);
  }
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
