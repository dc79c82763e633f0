// Float32 matrix products on AMX.
#include "bindings/bindings.h"

#include <stdexcept>
#include <tuple>

#include "cpu/matmul.h"

namespace dino_fast::bindings {
namespace {

// Address, rows, columns, strides of rows and of columns.
using MatrixTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

Matrix as_matrix(Validator& check, const char* name, const MatrixTuple& x) {
  const auto [data, rows, columns, row_stride, column_stride] = x;
  check.range("a matrix's rows", rows, 1);
  check.range("a matrix's columns", columns, 1);
  check.reads(name, data, check.extent(name, {rows, columns}, {row_stride, column_stride}));
  if (row_stride != 1 && column_stride != 1) {
    check.refuse(std::string("rows or columns of ") + name + " must be contiguous; got strides " +
                 std::to_string(row_stride) + " and " + std::to_string(column_stride));
  }
  return {address<const float>(data), rows, columns, row_stride, column_stride};
}

void matmul(const MatrixTuple& a_args, const MatrixTuple& b_args, int64_t bias, bool add, int64_t out, int64_t out_row,
            int threads) {
  Validator check("matmul");
  check.threads(threads);
  const Matrix a = as_matrix(check, "a", a_args), b = as_matrix(check, "b", b_args);
  if (a.columns != b.rows) {
    check.refuse("a has " + std::to_string(a.columns) + " columns but b " + std::to_string(b.rows) + " rows");
  }
  if (a.rows > 1) check.range("the stride of out's rows", out_row, b.columns);
  check.writes("out", out, check.extent("out", {a.rows, b.columns}, {out_row, 1}));
  if (bias != 0) check.reads("bias", bias, b.columns);
  if (bias != 0 && add) check.refuse("give a bias, or add for the content of out, not both");
  check.no_overlaps();
  if (const char* reason = matmul_unavailable_reason()) throw std::runtime_error(std::string("matmul: ") + reason);
  py::gil_scoped_release unlocked;
  dino_fast::matmul(a, b, address<const float>(bias), add, address<float>(out), out_row, threads);
}

}  // namespace

void bind_matmul(py::module_& m) {
  m.def("matmul", &matmul);
  m.def("matmul_unavailable_reason", &matmul_unavailable_reason);
}

}  // namespace dino_fast::bindings
