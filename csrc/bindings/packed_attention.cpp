// packed_attention's forward and backward on the CPU.
#include "bindings/bindings.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/packed_attention.h"

namespace dino_fast::bindings {
namespace {

// (qkv, strides of token, part and head, ends, sequences, tokens, heads, width, dtype)
using SequencesTuple =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// Whoever else has the ends may change them while the kernels run: these work from a copy that was checked.
class CheckedSequences {
 public:
  CheckedSequences(Validator& check, const SequencesTuple& t, int threads) {
    const auto [qkv, token_stride, part_stride, head_stride, ends, count, tokens, heads, width, dtype] = t;
    check.threads(threads);
    check.range("sequences", count, 0, INT32_MAX);
    check.range("tokens", tokens, 0, INT32_MAX);
    check.range("heads", heads, 1);
    check.range("a head's width", width, 1);
    bytes = check.dtype("qkv", dtype);
    const int64_t extent =
        check.extent("qkv", {tokens, 3, heads, width}, {token_stride, part_stride, head_stride, 1});
    check.reads("qkv", qkv, extent, bytes);
    rows = check.product("the output", {tokens, heads});
    elements = check.product("the output", {rows, width});
    check.product("the gradient", {elements, 3});
    check.reads("the ends", ends, count + 1);
    check.product("the heads of all sequences", {count, heads});
    const int32_t* given = address<int32_t>(ends);
    ends_.assign(given, given + count + 1);
    if (ends_.front() != 0 || ends_.back() != tokens || !std::is_sorted(ends_.begin(), ends_.end())) {
      check.refuse("the ends begin with 0, never fall and end with the number of tokens, " + std::to_string(tokens) +
                   "; got " + std::to_string(ends_.front()) + " to " + std::to_string(ends_.back()) +
                   (std::is_sorted(ends_.begin(), ends_.end()) ? "" : ", which fall in between"));
    }
    sequences = {address<void>(qkv), token_stride, part_stride, head_stride, ends_.data(), count, tokens, heads, width,
                 static_cast<Float>(dtype)};
  }
  CheckedSequences(const CheckedSequences&) = delete;
  CheckedSequences& operator=(const CheckedSequences&) = delete;

  Sequences sequences;
  int64_t bytes, rows, elements;  // of an element; in [tokens, heads] and [tokens, heads, width]

 private:
  std::vector<int32_t> ends_;
};

void packed_attention_forward(const SequencesTuple& given, int64_t out, int64_t logsumexp, int threads) {
  Validator check("packed_attention_forward");
  const CheckedSequences all(check, given, threads);
  check.writes("out", out, all.elements, all.bytes);
  check.writes("logsumexp", logsumexp, all.rows);
  check.no_overlaps();
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(packed_attention_forward)(all.sequences, address<void>(out), address<float>(logsumexp), threads);
}

void packed_attention_backward(const SequencesTuple& given, int64_t grad_out, int64_t gradient, int threads) {
  Validator check("packed_attention_backward");
  const CheckedSequences all(check, given, threads);
  check.reads("the output's gradient", grad_out, all.elements, all.bytes);
  check.writes("the gradient", gradient, 3 * all.elements, all.bytes);
  check.no_overlaps();
  py::gil_scoped_release unlocked;
  DINO_FAST_DISPATCH(packed_attention_backward)
  (all.sequences, address<void>(grad_out), address<void>(gradient), threads);
}

}  // namespace

void bind_packed_attention(py::module_& m) {
  m.def("packed_attention_forward", &packed_attention_forward);
  m.def("packed_attention_backward", &packed_attention_backward);
}

}  // namespace dino_fast::bindings
