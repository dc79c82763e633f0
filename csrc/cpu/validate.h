// Checks of the compiled module's arguments, before any memory is touched. Wrong ones throw std::invalid_argument, in
// Python ValueError. How long a buffer really is cannot be seen from its address; everything else is checked here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace dino_fast {

constexpr int64_t kMostThreads = 4096;

class Validator {
 public:
  explicit Validator(const char* operation) : operation_(operation) {}

  [[noreturn]] void refuse(const std::string& message) const {
    throw std::invalid_argument(std::string(operation_) + ": " + message);
  }

  // A whole number of [least, most].
  void range(const char* name, int64_t value, int64_t least, int64_t most = INT64_MAX) const {
    if (value >= least && value <= most) return;
    refuse(std::string(name) + " must be " + std::to_string(least) +
           (most == INT64_MAX ? " or more" : " to " + std::to_string(most)) + "; got " + std::to_string(value));
  }
  void positive(const char* name, double value) const {
    if (!(value > 0)) refuse(std::string(name) + " must be positive; got " + std::to_string(value));
  }
  void threads(int value) const { range("threads", value, 1, kMostThreads); }

  // The bytes of an element of this dtype.
  int64_t dtype(const char* name, int64_t code) const {
    if (code >= 0 && code <= 2) return code == 0 ? 4 : 2;
    refuse(std::string(name) + "'s dtype is code " + std::to_string(code) +
           "; accepted are 0 (float32), 1 (bfloat16) and 2 (float16)");
  }

  int64_t product(const char* name, std::initializer_list<int64_t> sizes) const {
    int64_t result = 1;
    for (int64_t size : sizes) {
      range(name, size, 0);
      if (__builtin_mul_overflow(result, size, &result)) refuse(std::string(name) + " has more than 2^63 elements");
    }
    return result;
  }

  // Elements from the first to the last of a strided array, 0 where a size is.
  int64_t extent(const char* name, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) const {
    int64_t result = 1;
    const int64_t* stride = strides.begin();
    for (int64_t size : sizes) {
      const int64_t apart = *stride++;
      range(name, size, 0);
      if (size == 0) return 0;
      if (apart < 0) refuse(std::string(name) + "'s strides must be 0 or more; got " + std::to_string(apart));
      int64_t last;
      if (__builtin_mul_overflow(size - 1, apart, &last) || __builtin_add_overflow(result, last, &result)) {
        refuse(std::string(name) + " reaches over more than 2^63 elements");
      }
    }
    return result;
  }

  // Memory that is read or written: `count` elements of `bytes` each. Null only where there are none.
  void reads(const char* name, int64_t address, int64_t count, int64_t bytes = 4, int64_t row = -1) {
    add(read_, name, address, count, bytes, row);
  }
  void writes(const char* name, int64_t address, int64_t count, int64_t bytes = 4, int64_t row = -1) {
    add(written_, name, address, count, bytes, row);
  }

  // Refuses written memory that overlaps any other; call it last, when all memory is known.
  void no_overlaps() {
    const auto begins_before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
    std::sort(written_.begin(), written_.end(), begins_before);
    for (size_t i = 1; i < written_.size(); ++i) {
      if (written_[i].begin < written_[i - 1].end) overlap(written_[i - 1], written_[i]);
    }
    for (const Span& read : read_) {
      const auto after = std::partition_point(written_.begin(), written_.end(),
                                              [&](const Span& span) { return span.begin < read.end; });
      if (after != written_.begin() && (after - 1)->end > read.begin) overlap(*(after - 1), read);
    }
  }

 private:
  struct Span {
    int64_t begin, end;
    const char* name;
    int64_t row;
  };

  void add(std::vector<Span>& spans, const char* name, int64_t address, int64_t count, int64_t bytes, int64_t row) {
    if (count == 0) return;
    const Span span{address, address, name, row};
    if (address == 0) {
      refuse(describe(span) + " is a null address, but " + std::to_string(count) + " elements are needed");
    }
    int64_t size, end;
    if (count < 0 || address < 0 || __builtin_mul_overflow(count, bytes, &size) ||
        __builtin_add_overflow(address, size, &end)) {
      refuse(describe(span) + " cannot have " + std::to_string(count) + " elements at address " +
             std::to_string(address));
    }
    if (spans.empty()) spans.reserve(8);
    spans.push_back({address, end, name, row});
  }

  static std::string describe(const Span& span) {
    return span.row < 0 ? span.name : std::string(span.name) + " of row " + std::to_string(span.row);
  }

  [[noreturn]] void overlap(const Span& written, const Span& other) const {
    refuse(describe(written) + " is written and shares memory with " + describe(other) + "; give it memory of its own");
  }

  const char* operation_;
  std::vector<Span> read_, written_;
};

}  // namespace dino_fast
