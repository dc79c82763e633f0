// Shared by the files that define the Python module dino_fast._C, one for each operation. Each function takes raw
// addresses (tensor.data_ptr()), shapes and strides, checks them (cpu/validate.h), and releases the interpreter lock
// while it works. Lengths of buffers, dtypes and devices are known to tensors alone: dino_fast/ops checks them before.
// tests/test_native.py has a case for each function.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "cpu/instruction_set.h"
#include "cpu/validate.h"

namespace dino_fast::bindings {

namespace py = pybind11;

void bind_dino_loss(py::module_& m);
void bind_linear_dino_loss(py::module_& m);
void bind_matmul(py::module_& m);
void bind_multi_crop(py::module_& m);
void bind_multi_tensor(py::module_& m);
void bind_packed_attention(py::module_& m);

template <typename T> T* address(int64_t value) { return reinterpret_cast<T*>(static_cast<intptr_t>(value)); }

// A table of `count` columns of n entries: a contiguous buffer of int64, float or double.
template <typename T>
const T* columns(const Validator& check, const py::buffer_info& table, int64_t n, int64_t count) {
  check.range("the number of rows", n, 0);
  int64_t step = table.itemsize;
  bool contiguous = true;
  for (py::ssize_t d = table.ndim - 1; d >= 0; step *= table.shape[d--]) {
    contiguous = contiguous && (table.shape[d] <= 1 || table.strides[d] == step);
  }
  if (!table.item_type_is_equivalent_to<T>() || !(contiguous || table.size == 0)) {
    check.refuse("tables must be contiguous, of whole numbers of 64 bits or floats of " +
                 std::to_string(8 * sizeof(T)) + "; got format '" + table.format + "'");
  }
  if (table.size != check.product("the table", {n, count})) {
    check.refuse("a table of " + std::to_string(count) + " columns of " + std::to_string(n) +
                 " entries is needed; got " + std::to_string(table.size) + " entries");
  }
  return static_cast<const T*>(table.ptr);
}

}  // namespace dino_fast::bindings
