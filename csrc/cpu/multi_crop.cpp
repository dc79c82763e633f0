// multi_crop on the CPU: one task a crop, 8 bits after every operation, equal to Pillow's to the bit.
//
// Resizing is one routine, called twice: it resamples 16 lines at a time along their length and writes the result
// transposed, so that the second call sees columns as lines. Sixteen lines are first laid out as pairs of neighbouring
// pixels, 16 bits each: one multiply-add instruction then takes two taps of sixteen lines. A 22-bit coefficient is split
// into 11 high and 11 low bits, two such instructions, and the 32-bit sum is exact.
//
// Memory of a crop: the box's rows by the crop's columns, and the crop three times, one byte a pixel and channel.
// Operations at 500 x 375, 2 crops of 224 and 8 of 96: 12 M multiply-adds to resize, 0.5 M values in each later operation.
#include "cpu/multi_crop.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
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
// `from` has 16 lines for every 16 columns or part of them; what lies beyond the result's width in a line is undefined.
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

// What a thread keeps from crop to crop.
struct Scratch {
  Filter across, down;
  std::vector<int16_t> pairs;
  std::vector<uint8_t> rows, columns, planes, blurred, line;
  std::vector<uint32_t> sums;
};

// The crop while it is worked on: planes of 8-bit pixels whose rows are padded to whole vectors.
struct Planes {
  uint8_t* pixels;
  int channels;
  int64_t height, width, stride;
  int64_t size() const { return height * stride; }
  uint8_t* plane(int c) const { return pixels + c * size(); }
};

void blend_with(const Planes& planes, int other, float factor) {
  const int64_t n = planes.channels * planes.size();
  uint8_t* p = planes.pixels;
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(pixel::blend(other, p[i], factor));
}

// The mean of the luma, or of all channels where there is no luma, to the nearest integer.
int mean_level(const Planes& planes) {
  int64_t sum = 0;
  const int summed = planes.channels == 3 ? 1 : planes.channels;
  for (int c = 0; c < summed; ++c) {
    for (int64_t y = 0; y < planes.height; ++y) {
      const uint8_t* row = planes.plane(c) + y * planes.stride;
      uint32_t part = 0;
      if (planes.channels == 3) {
        const uint8_t *g = row + planes.size(), *b = g + planes.size();
        for (int64_t x = 0; x < planes.width; ++x) part += pixel::luma(row[x], g[x], b[x]);
      } else {
        for (int64_t x = 0; x < planes.width; ++x) part += row[x];
      }
      sum += part;
    }
  }
  return static_cast<int>(static_cast<double>(sum) / static_cast<double>(summed * planes.height * planes.width) + 0.5);
}

void saturation(const Planes& planes, float factor) {
  uint8_t* __restrict r = planes.plane(0);
  uint8_t* __restrict g = planes.plane(1);
  uint8_t* __restrict b = planes.plane(2);
  for (int64_t i = 0, n = planes.size(); i < n; ++i) {
    const int level = pixel::luma(r[i], g[i], b[i]);
    r[i] = static_cast<uint8_t>(pixel::blend(level, r[i], factor));
    g[i] = static_cast<uint8_t>(pixel::blend(level, g[i], factor));
    b[i] = static_cast<uint8_t>(pixel::blend(level, b[i], factor));
  }
}

void hue(const Planes& planes, float factor) {
  const int turn = static_cast<int>(static_cast<double>(factor) * 255);
  uint8_t* __restrict r = planes.plane(0);
  uint8_t* __restrict g = planes.plane(1);
  uint8_t* __restrict b = planes.plane(2);
  for (int64_t i = 0, n = planes.size(); i < n; ++i) {
    int vr = r[i], vg = g[i], vb = b[i];
    pixel::turn_hue(vr, vg, vb, turn);
    r[i] = static_cast<uint8_t>(vr);
    g[i] = static_cast<uint8_t>(vg);
    b[i] = static_cast<uint8_t>(vb);
  }
}

void jitter(const Planes& planes, const CropTask& task) {
  for (int operation : task.order) {
    if (operation < 0) continue;
    const float factor = task.factors[operation];
    if (operation == 0) blend_with(planes, 0, factor);
    else if (operation == 1) blend_with(planes, mean_level(planes), factor);
    else if (planes.channels == 3 && operation == 2) saturation(planes, factor);
    else if (planes.channels == 3) hue(planes, factor);
  }
}

void grey(const Planes& planes) {
  uint8_t* __restrict r = planes.plane(0);
  uint8_t* __restrict g = planes.plane(1);
  uint8_t* __restrict b = planes.plane(2);
  for (int64_t i = 0, n = planes.size(); i < n; ++i) {
    r[i] = g[i] = b[i] = static_cast<uint8_t>(pixel::luma(r[i], g[i], b[i]));
  }
}

// One box blur: pixel i of line y from lines y - radius - 1 to y + radius + 1, which the caller's `line` finds.
template <typename Line>
DINO_FAST_INLINE void box_rows(const pixel::Box& box, int64_t n, uint32_t* __restrict sums, uint8_t* __restrict out,
                               const Line& line) {
  const int r = box.radius;
  const uint8_t *before = line(-r - 1), *after = line(r + 1), *middle = line(0);
  if (r == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = pixel::box_mean(box, middle[i], before[i] + after[i]);
  } else if (r == 1) {
    const uint8_t *left = line(-1), *right = line(1);
    for (int64_t i = 0; i < n; ++i) {
      out[i] = pixel::box_mean(box, left[i] + middle[i] + right[i], before[i] + after[i]);
    }
  } else {
    std::memset(sums, 0, n * sizeof(uint32_t));
    for (int d = -r; d <= r; ++d) {
      const uint8_t* other = line(d);
      for (int64_t i = 0; i < n; ++i) sums[i] += other[i];
    }
    for (int64_t i = 0; i < n; ++i) out[i] = pixel::box_mean(box, sums[i], before[i] + after[i]);
  }
}

// Three box blurs along the rows, then three down the columns; beyond the edge is the edge.
void blur_plane(uint8_t* plane, const Planes& shape, const pixel::Box& box, Scratch& scratch) {
  const int64_t w = shape.width, h = shape.height, stride = shape.stride, margin = box.radius + 1;
  scratch.line.resize(stride + 2 * margin);
  scratch.sums.resize(stride);
  scratch.blurred.resize(shape.size());
  uint8_t *line = scratch.line.data(), *other = scratch.blurred.data();
  for (int64_t y = 0; y < h; ++y) {
    uint8_t* row = plane + y * stride;
    for (int pass = 0; pass < 3; ++pass) {
      std::memset(line, row[0], margin);
      std::memcpy(line + margin, row, w);
      std::memset(line + margin + w, row[w - 1], stride - w + margin);
      box_rows(box, stride, scratch.sums.data(), row, [&](int64_t d) { return line + margin + d; });
    }
  }
  for (int pass = 0; pass < 3; ++pass) {
    const uint8_t* from = pass == 1 ? other : plane;
    uint8_t* to = pass == 1 ? plane : other;
    for (int64_t y = 0; y < h; ++y) {
      box_rows(box, stride, scratch.sums.data(), to + y * stride,
               [&](int64_t d) { return from + std::clamp<int64_t>(y + d, 0, h - 1) * stride; });
    }
  }
  std::memcpy(plane, other, shape.size());
}

template <typename T>
void write(const Planes& planes, const CropTask& task, const CropOutput& output) {
  T* __restrict out = static_cast<T*>(task.crop);
  const int mirrored = task.solarize ? 128 : 256;  // levels from here on are taken from 255
  for (int c = 0; c < planes.channels; ++c) {
    const pixel::Normal normal = pixel::normal(output.mean[c], output.std[c]);
    for (int64_t y = 0; y < planes.height; ++y) {
      const uint8_t* __restrict row = planes.plane(c) + y * planes.stride;
      for (int64_t x = 0; x < planes.width; ++x) {
        const int level = row[x] < mirrored ? row[x] : 255 - row[x];
        out[x] = from_float<T>(pixel::normalised(normal, level));
      }
      out += planes.width;
    }
  }
}

void one_crop(const CropTask& task, const CropOutput& output) {
  static thread_local Scratch scratch;
  const int channels = output.channels;
  const bool down_first = pixel::down_first(task.box_height - task.crop_height, task.box_width - task.crop_width);
  const int64_t stride = padded(task.crop_width), row_stride = padded(task.box_width);
  const int64_t column_stride = padded(down_first ? task.crop_height : task.box_height);
  make_filter(scratch.across, static_cast<int>(task.box_width), static_cast<int>(task.crop_width));
  make_filter(scratch.down, static_cast<int>(task.box_height), static_cast<int>(task.crop_height));
  scratch.columns.resize(stride * column_stride);
  if (down_first) scratch.rows.resize(task.crop_height * row_stride);
  scratch.planes.resize(channels * task.crop_height * stride);
  const Planes planes{scratch.planes.data(), channels, task.crop_height, task.crop_width, stride};
  for (int c = 0; c < channels; ++c) {
    const uint8_t* box = task.image + (c * task.height + task.top) * task.width + task.left;
    if (down_first) {
      resample_down(box, task.box_width, task.width, task.box_height, scratch.down, scratch.rows.data(), row_stride);
      resample(scratch.rows.data(), task.crop_height, task.box_width, row_stride, scratch.across, task.flip, scratch.pairs,
               scratch.columns.data(), column_stride);
      transpose(scratch.columns.data(), column_stride, task.crop_height, task.crop_width, planes.plane(c), stride);
    } else {
      resample(box, task.box_height, task.box_width, task.width, scratch.across, task.flip, scratch.pairs,
               scratch.columns.data(), column_stride);
      resample(scratch.columns.data(), task.crop_width, task.box_height, column_stride, scratch.down, false, scratch.pairs,
               planes.plane(c), stride);
    }
  }
  jitter(planes, task);
  const bool greyed = task.grey && channels == 3;
  if (greyed) grey(planes);
  if (task.blur && task.radius > 0) {
    const pixel::Box box = pixel::box_of(task.radius);
    for (int c = 0; c < (greyed ? 1 : channels); ++c) blur_plane(planes.plane(c), planes, box, scratch);
    for (int c = 1; greyed && c < channels; ++c) std::memcpy(planes.plane(c), planes.plane(0), planes.size());
  }
  if (output.bfloat16) write<bf16>(planes, task, output);
  else write<float>(planes, task, output);
}

}  // namespace

void multi_crop(const CropTask* tasks, int64_t n, const CropOutput& output, int threads) {
  parallel_for(n, threads, [&](int64_t i) { one_crop(tasks[i], output); });
}

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
