// Resampling of 8-bit lines and columns, exactly as Pillow's: coefficients of 22 bits, 8 bits after every pass. For
// multi_crop.cpp alone, once per instruction set.
//
// resample() takes 16 lines at a time along their length and writes the result transposed, so that a second call sees
// columns as lines. Sixteen lines are first laid out as pairs of neighbouring pixels, 16 bits each: one multiply-add
// instruction then takes two taps of sixteen lines. A 22-bit coefficient is split into 11 high and 11 low bits, two such
// instructions, and the 32-bit sum is exact. resample_down() takes columns first: whole rows are weighted and summed.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd.h"
#include "multi_crop_math.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dino_fast {
namespace DINO_FAST_ISA {
namespace {

constexpr int kLines = 16;
constexpr int kLowBits = 11;

int64_t padded(int64_t n) { return (n + kLines - 1) / kLines * kLines; }

// Two 16-bit factors in the order in which a multiply-add instruction takes them.
int32_t two(int first, int second) {
  return static_cast<int32_t>((static_cast<uint32_t>(second) << 16) | (static_cast<uint32_t>(first) & 0xffff));
}

struct Filter {
  std::vector<int32_t> first, count;  // per output pixel: first pair, and pairs
  std::vector<int32_t> high, low;     // [outputs, stride] pairs of coefficients
  std::vector<int32_t> whole;         // [outputs, 2 * stride] coefficients
  int64_t stride;
};

void make_filter(Filter& filter, int from, int to) {
  const double stretch = std::max(1.0, static_cast<double>(from) / to);
  filter.stride = static_cast<int64_t>(2 * stretch) + 4;  // support on both sides, two taps a pair
  filter.first.resize(to);
  filter.count.resize(to);
  filter.high.assign(to * filter.stride, 0);
  filter.low.assign(to * filter.stride, 0);
  filter.whole.assign(to * 2 * filter.stride, 0);
  std::vector<double> weights;
  std::vector<int> fixed;
  for (int at = 0; at < to; ++at) {
    const pixel::Taps taps = pixel::taps(at, from, to);
    weights.resize(taps.count);
    double sum = 0;
    for (int i = 0; i < taps.count; ++i) sum += weights[i] = pixel::weight(taps, i);
    const int shift = taps.first & 1, pairs = (taps.count + shift + 1) / 2;
    fixed.assign(2 * pairs, 0);
    for (int i = 0; i < taps.count; ++i) fixed[i + shift] = pixel::to_fixed(sum != 0 ? weights[i] / sum : weights[i]);
    std::copy(fixed.begin(), fixed.end(), filter.whole.begin() + at * 2 * filter.stride);
    filter.first[at] = taps.first / 2;
    filter.count[at] = pairs;
    const int mask = (1 << kLowBits) - 1;
    for (int p = 0; p < pairs; ++p) {
      const int a = fixed[2 * p], b = fixed[2 * p + 1];
      filter.high[at * filter.stride + p] = two(a >> kLowBits, b >> kLowBits);
      filter.low[at * filter.stride + p] = two(a & mask, b & mask);
    }
  }
}

// lines[r][0..15] -> pairs[8][16 lines][2], 16 bits a pixel.
#if defined(__SSE2__)
DINO_FAST_INLINE void lay_out(const uint8_t* const* lines, int16_t* pairs) {
  const __m128i zero = _mm_setzero_si128();
  for (int half = 0; half < 2; ++half) {
    __m128i a[8], b[8];
    for (int r = 0; r < 8; ++r) a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines[8 * half + r]));
    for (int r = 0; r < 4; ++r) {
      b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
      b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
    }
    for (int r = 0; r < 4; ++r) {
      a[2 * r] = _mm_unpacklo_epi16(b[r], b[r + 4]);
      a[2 * r + 1] = _mm_unpackhi_epi16(b[r], b[r + 4]);
    }
    for (int r = 0; r < 4; ++r) {
      b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
      b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
    }
    for (int p = 0; p < 8; ++p) {
      __m128i* to = reinterpret_cast<__m128i*>(pairs + p * 2 * kLines + 16 * half);
      _mm_storeu_si128(to, _mm_unpacklo_epi8(b[p], zero));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(b[p], zero));
    }
  }
}
#else
DINO_FAST_INLINE void lay_out(const uint8_t* const* lines, int16_t* pairs) {
  for (int p = 0; p < 8; ++p) {
    for (int r = 0; r < kLines; ++r) {
      pairs[(p * kLines + r) * 2] = lines[r][2 * p];
      pairs[(p * kLines + r) * 2 + 1] = lines[r][2 * p + 1];
    }
  }
}
#endif

// from [16][16] with lines from_stride apart -> to [16][16]
#if defined(__SSE2__)
DINO_FAST_INLINE void transpose_block(const uint8_t* from, int64_t from_stride, uint8_t to[16][16]) {
  __m128i a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * from_stride));
  for (int step = 0; step < 4; ++step) {  // each interleaves the lines' first half with the second: four make a full turn
    for (int r = 0; r < 8; ++r) {
      b[2 * r] = _mm_unpacklo_epi8(a[r], a[r + 8]);
      b[2 * r + 1] = _mm_unpackhi_epi8(a[r], a[r + 8]);
    }
    for (int r = 0; r < 16; ++r) a[r] = b[r];
  }
  for (int r = 0; r < 16; ++r) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[r]), a[r]);
}
#else
DINO_FAST_INLINE void transpose_block(const uint8_t* from, int64_t from_stride, uint8_t to[16][16]) {
  for (int r = 0; r < 16; ++r) {
    for (int i = 0; i < 16; ++i) to[i][r] = from[r * from_stride + i];
  }
}
#endif

// One output pixel of sixteen lines.
#if defined(DINO_FAST_ISA_avx512)
DINO_FAST_INLINE void weigh(const int16_t* pairs, const int32_t* high, const int32_t* low, int n, uint8_t* out) {
  __m512i h = _mm512_setzero_si512(), l = _mm512_set1_epi32(1 << (pixel::kCoefficientBits - 1));
  for (int p = 0; p < n; ++p) {
    const __m512i x = _mm512_loadu_si512(pairs + p * 2 * kLines);
    h = _mm512_add_epi32(h, _mm512_madd_epi16(x, _mm512_set1_epi32(high[p])));
    l = _mm512_add_epi32(l, _mm512_madd_epi16(x, _mm512_set1_epi32(low[p])));
  }
  const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(h, kLowBits), l);
  const __m512i level = _mm512_max_epi32(_mm512_srai_epi32(sum, pixel::kCoefficientBits), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(level));
}
#elif defined(DINO_FAST_ISA_avx2)
DINO_FAST_INLINE void weigh(const int16_t* pairs, const int32_t* high, const int32_t* low, int n, uint8_t* out) {
  const __m256i half = _mm256_set1_epi32(1 << (pixel::kCoefficientBits - 1));
  __m256i h0 = _mm256_setzero_si256(), h1 = h0, l0 = half, l1 = half;
  for (int p = 0; p < n; ++p) {
    const __m256i* x = reinterpret_cast<const __m256i*>(pairs + p * 2 * kLines);
    const __m256i x0 = _mm256_loadu_si256(x), x1 = _mm256_loadu_si256(x + 1);
    const __m256i ch = _mm256_set1_epi32(high[p]), cl = _mm256_set1_epi32(low[p]);
    h0 = _mm256_add_epi32(h0, _mm256_madd_epi16(x0, ch));
    h1 = _mm256_add_epi32(h1, _mm256_madd_epi16(x1, ch));
    l0 = _mm256_add_epi32(l0, _mm256_madd_epi16(x0, cl));
    l1 = _mm256_add_epi32(l1, _mm256_madd_epi16(x1, cl));
  }
  const __m256i s0 = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(h0, kLowBits), l0), pixel::kCoefficientBits);
  const __m256i s1 = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(h1, kLowBits), l1), pixel::kCoefficientBits);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(s0, s1), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
DINO_FAST_INLINE void weigh(const int16_t* pairs, const int32_t* high, const int32_t* low, int n, uint8_t* out) {
  int32_t sums[kLines];
  for (int32_t& sum : sums) sum = 1 << (pixel::kCoefficientBits - 1);
  for (int p = 0; p < n; ++p) {
    const int32_t a = static_cast<int16_t>(high[p]) * (1 << kLowBits) + (low[p] & 0xffff);
    const int32_t b = (high[p] >> 16) * (1 << kLowBits) + (low[p] >> 16);
    const int16_t* x = pairs + p * 2 * kLines;
    for (int r = 0; r < kLines; ++r) sums[r] += x[2 * r] * a + x[2 * r + 1] * b;
  }
  for (int r = 0; r < kLines; ++r) out[r] = static_cast<uint8_t>(pixel::clip(sums[r] >> pixel::kCoefficientBits));
}
#endif

// Resamples n lines of `length` pixels, `stride` apart; pixel x of line r goes to out[x * out_stride + r], or, reversed, x
// counted from the end. out_stride is at least padded(n).
void resample(const uint8_t* lines, int64_t n, int64_t length, int64_t stride, const Filter& filter, bool reversed,
              std::vector<int16_t>& pairs, uint8_t* out, int64_t out_stride) {
  const int64_t outputs = static_cast<int64_t>(filter.first.size());
  pairs.resize((padded(length) + kLines) * kLines);
  for (int64_t first = 0; first < n; first += kLines) {
    const uint8_t* at[kLines];
    for (int r = 0; r < kLines; ++r) at[r] = lines + std::min(first + r, n - 1) * stride;
    int64_t x = 0;
    for (; x + 16 <= length; x += 16) {
      lay_out(at, pairs.data() + x * kLines);
      for (const uint8_t*& line : at) line += 16;
    }
    if (x < length) {
      uint8_t rest[kLines][16] = {};
      for (int r = 0; r < kLines; ++r) {
        std::memcpy(rest[r], at[r], length - x);
        at[r] = rest[r];
      }
      lay_out(at, pairs.data() + x * kLines);
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t to = reversed ? outputs - 1 - o : o;
      weigh(pairs.data() + int64_t{filter.first[o]} * 2 * kLines, filter.high.data() + o * filter.stride,
            filter.low.data() + o * filter.stride, filter.count[o], out + to * out_stride + first);
    }
  }
}

// Sums of kLines neighbouring pixels of weighted rows.
#if defined(DINO_FAST_ISA_avx512)
struct Sums {
  __m512i s = _mm512_set1_epi32(1 << (pixel::kCoefficientBits - 1));
  DINO_FAST_INLINE void add(const uint8_t* row, int32_t weight) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    s = _mm512_add_epi32(s, _mm512_mullo_epi32(x, _mm512_set1_epi32(weight)));
  }
  DINO_FAST_INLINE void store(uint8_t* out) const {
    const __m512i level = _mm512_max_epi32(_mm512_srai_epi32(s, pixel::kCoefficientBits), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(level));
  }
};
#elif defined(DINO_FAST_ISA_avx2)
struct Sums {
  __m256i s = _mm256_set1_epi32(1 << (pixel::kCoefficientBits - 1)), t = s;
  DINO_FAST_INLINE void add(const uint8_t* row, int32_t weight) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    const __m256i w = _mm256_set1_epi32(weight);
    s = _mm256_add_epi32(s, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(x), w));
    t = _mm256_add_epi32(t, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x)), w));
  }
  DINO_FAST_INLINE void store(uint8_t* out) const {
    const __m256i a = _mm256_srai_epi32(s, pixel::kCoefficientBits), b = _mm256_srai_epi32(t, pixel::kCoefficientBits);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
};
#else
struct Sums {
  int32_t s[kLines];
  DINO_FAST_INLINE Sums() {
    for (int32_t& sum : s) sum = 1 << (pixel::kCoefficientBits - 1);
  }
  DINO_FAST_INLINE void add(const uint8_t* row, int32_t weight) {
    for (int i = 0; i < kLines; ++i) s[i] += row[i] * weight;
  }
  DINO_FAST_INLINE void store(uint8_t* out) const {
    for (int i = 0; i < kLines; ++i) out[i] = static_cast<uint8_t>(pixel::clip(s[i] >> pixel::kCoefficientBits));
  }
};
#endif

// Resamples n columns, rows `stride` apart; row o of the result goes to out + o * out_stride, at least padded(n) wide.
void resample_down(const uint8_t* rows, int64_t n, int64_t stride, int64_t height, const Filter& filter, uint8_t* out,
                   int64_t out_stride) {
  const int64_t outputs = static_cast<int64_t>(filter.first.size());
  for (int64_t o = 0; o < outputs; ++o, out += out_stride) {
    const int32_t* weights = filter.whole.data() + o * 2 * filter.stride;
    const int64_t first = int64_t{filter.first[o]} * 2, taps = std::min<int64_t>(2 * filter.count[o], height - first);
    const uint8_t* from = rows + first * stride;
    int64_t x = 0;
    for (; x + 4 * kLines <= n; x += 4 * kLines) {
      Sums a, b, c, d;
      for (int64_t t = 0; t < taps; ++t) {
        const uint8_t* row = from + t * stride + x;
        a.add(row, weights[t]);
        b.add(row + kLines, weights[t]);
        c.add(row + 2 * kLines, weights[t]);
        d.add(row + 3 * kLines, weights[t]);
      }
      a.store(out + x);
      b.store(out + x + kLines);
      c.store(out + x + 2 * kLines);
      d.store(out + x + 3 * kLines);
    }
    for (; x + kLines <= n; x += kLines) {
      Sums sums;
      for (int64_t t = 0; t < taps; ++t) sums.add(from + t * stride + x, weights[t]);
      sums.store(out + x);
    }
    if (x < n) {  // the image may end here
      Sums sums;
      for (int64_t t = 0; t < taps; ++t) {
        uint8_t row[kLines] = {};
        std::memcpy(row, from + t * stride + x, n - x);
        sums.add(row, weights[t]);
      }
      sums.store(out + x);
    }
  }
}

// from [width, height] -> to [height, width], lines from_stride and to_stride apart. Both strides are multiples of 16, and
// `from` has 16 lines for every 16 columns or part of them; elements beyond the result's width in a line are undefined.
void transpose(const uint8_t* from, int64_t from_stride, int64_t height, int64_t width, uint8_t* to, int64_t to_stride) {
  for (int64_t x = 0; x < width; x += 16) {
    for (int64_t y = 0; y < height; y += 16) {
      uint8_t block[16][16];
      transpose_block(from + x * from_stride + y, from_stride, block);
      const int64_t down = std::min<int64_t>(16, height - y);
      for (int64_t i = 0; i < down; ++i) std::memcpy(to + (y + i) * to_stride + x, block[i], 16);
    }
  }
}

}  // namespace
}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
