// Float32 matrix products by the tile unit of x86 processors that have AMX; see matmul.cpp.
#pragma once

#include <cstdint>

namespace dino_fast {

// A matrix of `rows` by `columns` floats of which element (i, j) is at data[i * row_stride + j * column_stride]; one of
// the strides is 1.
struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

// Null where products can be made so on this machine, else the reason why not.
const char* matmul_unavailable_reason();

// c [M, N], rows c_row apart, = a [M, K] b [K, N], plus what was there where `add`, plus bias [N] where it is not null
// (not both). Each result is the same however many threads there are.
void matmul(const Matrix& a, const Matrix& b, const float* bias, bool add, float* c, int64_t c_row, int threads);

}  // namespace dino_fast
