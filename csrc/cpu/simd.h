// One vector of floats, in the widest form that the file is compiled for: 16 (AVX-512), 8 (AVX2) or 8 in plain C++,
// which compilers turn into whatever the target has (SSE2, NEON). A kernel is written once over Vec and compiled once
// per instruction set, in the namespace dino_fast::<isa>.
//
// Arithmetic is float32; bfloat16 and float16 exist only in memory and are converted as they are read and written.
// Conversions round to nearest even, as PyTorch's do, and keep NaN a NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(DINO_FAST_ISA_avx2) || defined(DINO_FAST_ISA_avx512)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own headers start some results from an undefined vector
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define DINO_FAST_INLINE inline __attribute__((always_inline))

namespace dino_fast {
namespace DINO_FAST_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

DINO_FAST_INLINE float bits_to_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
DINO_FAST_INLINE uint32_t float_to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

DINO_FAST_INLINE float to_float(float x) { return x; }
DINO_FAST_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
DINO_FAST_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <typename T> T from_float(float x);
template <> DINO_FAST_INLINE float from_float<float>(float x) { return x; }
template <> DINO_FAST_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> DINO_FAST_INLINE f16 from_float<f16>(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds past 65504: infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lets the hardware round at bit 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}

#if defined(DINO_FAST_ISA_avx512)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
  DINO_FAST_INLINE Vec() = default;
  DINO_FAST_INLINE Vec(__m512 x) : v(x) {}
  DINO_FAST_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};

DINO_FAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
DINO_FAST_INLINE Vec widen(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
DINO_FAST_INLINE Vec widen(__m256i x, f16) { return _mm512_cvtph_ps(x); }
DINO_FAST_INLINE __m256i narrow(Vec x, bf16) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}
DINO_FAST_INLINE __m256i narrow(Vec x, f16) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <typename H> DINO_FAST_INLINE Vec load(const H* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), H{});
}
DINO_FAST_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
template <typename H> DINO_FAST_INLINE void store(H* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, H{}));
}
// Non-temporal: skips the cache, and with it the read of the line that an ordinary store causes. p must be aligned to
// the vector (64 bytes for float, 32 for the halves); call stream_fence() when done.
DINO_FAST_INLINE void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
template <typename H> DINO_FAST_INLINE void stream(H* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x, H{}));
}
DINO_FAST_INLINE void stream_fence() { _mm_sfence(); }

DINO_FAST_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
DINO_FAST_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
DINO_FAST_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
DINO_FAST_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
DINO_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }     // a*b + c
DINO_FAST_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }   // c - a*b
DINO_FAST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }  // b where either is NaN
DINO_FAST_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }  // b where either is NaN
DINO_FAST_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
DINO_FAST_INLINE Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
DINO_FAST_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
DINO_FAST_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// to [16, 16] = the transpose of from [16, 16], rows at strides: pairs, then fours of columns, then the quarters of vectors.
DINO_FAST_INLINE void transpose_tile(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m512 two[16], four[16];
  for (int i = 0; i < 8; ++i) {
    const __m512 even = _mm512_loadu_ps(from + 2 * i * from_row), odd = _mm512_loadu_ps(from + (2 * i + 1) * from_row);
    two[2 * i] = _mm512_unpacklo_ps(even, odd);
    two[2 * i + 1] = _mm512_unpackhi_ps(even, odd);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(two[i + k]), high = _mm512_castps_pd(two[i + k + 2]);
      four[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      four[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int k = 0; k < 4; ++k) {
    const __m512 top02 = _mm512_shuffle_f32x4(four[k], four[4 + k], 0x88), top13 = _mm512_shuffle_f32x4(four[k], four[4 + k], 0xdd);
    const __m512 low02 = _mm512_shuffle_f32x4(four[8 + k], four[12 + k], 0x88), low13 = _mm512_shuffle_f32x4(four[8 + k], four[12 + k], 0xdd);
    _mm512_storeu_ps(to + k * to_row, _mm512_shuffle_f32x4(top02, low02, 0x88));
    _mm512_storeu_ps(to + (4 + k) * to_row, _mm512_shuffle_f32x4(top13, low13, 0x88));
    _mm512_storeu_ps(to + (8 + k) * to_row, _mm512_shuffle_f32x4(top02, low02, 0xdd));
    _mm512_storeu_ps(to + (12 + k) * to_row, _mm512_shuffle_f32x4(top13, low13, 0xdd));
  }
}

#elif defined(DINO_FAST_ISA_avx2)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
  DINO_FAST_INLINE Vec() = default;
  DINO_FAST_INLINE Vec(__m256 x) : v(x) {}
  DINO_FAST_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};

DINO_FAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
DINO_FAST_INLINE Vec widen(__m128i x, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
DINO_FAST_INLINE Vec widen(__m128i x, f16) { return _mm256_cvtph_ps(x); }
DINO_FAST_INLINE __m128i narrow(Vec x, bf16) {
  const __m256i bits = _mm256_castps_si256(x.v), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}
DINO_FAST_INLINE __m128i narrow(Vec x, f16) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <typename H> DINO_FAST_INLINE Vec load(const H* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), H{});
}
DINO_FAST_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
template <typename H> DINO_FAST_INLINE void store(H* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, H{}));
}
DINO_FAST_INLINE void stream(float* p, Vec x) { _mm256_stream_ps(p, x.v); }
template <typename H> DINO_FAST_INLINE void stream(H* p, Vec x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(x, H{}));
}
DINO_FAST_INLINE void stream_fence() { _mm_sfence(); }

DINO_FAST_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
DINO_FAST_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
DINO_FAST_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
DINO_FAST_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
DINO_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
DINO_FAST_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
DINO_FAST_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
DINO_FAST_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
DINO_FAST_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
DINO_FAST_INLINE Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DINO_FAST_INLINE Vec times_power_of_two(Vec a, Vec n) {  // in two halves, so that subnormal results survive
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 x = _mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
DINO_FAST_INLINE float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DINO_FAST_INLINE float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

DINO_FAST_INLINE void transpose_tile(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 two[8], four[8];
  for (int i = 0; i < 4; ++i) {
    const __m256 even = _mm256_loadu_ps(from + 2 * i * from_row), odd = _mm256_loadu_ps(from + (2 * i + 1) * from_row);
    two[2 * i] = _mm256_unpacklo_ps(even, odd);
    two[2 * i + 1] = _mm256_unpackhi_ps(even, odd);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m256d low = _mm256_castps_pd(two[i + k]), high = _mm256_castps_pd(two[i + k + 2]);
      four[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      four[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(to + k * to_row, _mm256_permute2f128_ps(four[k], four[4 + k], 0x20));
    _mm256_storeu_ps(to + (4 + k) * to_row, _mm256_permute2f128_ps(four[k], four[4 + k], 0x31));
  }
}

#else  // portable

struct Vec {
  static constexpr int width = 8;
  float v[8];
  Vec() = default;
  DINO_FAST_INLINE explicit Vec(float x) { for (float& y : v) y = x; }
};

template <typename F> DINO_FAST_INLINE Vec map(F f) { Vec r; for (int i = 0; i < 8; ++i) r.v[i] = f(i); return r; }
template <typename T> DINO_FAST_INLINE Vec load(const T* p) { return map([=](int i) { return to_float(p[i]); }); }
template <typename T> DINO_FAST_INLINE void store(T* p, Vec x) { for (int i = 0; i < 8; ++i) p[i] = from_float<T>(x.v[i]); }
template <typename T> DINO_FAST_INLINE void stream(T* p, Vec x) { store(p, x); }
DINO_FAST_INLINE void stream_fence() {}

DINO_FAST_INLINE Vec operator+(Vec a, Vec b) { return map([&](int i) { return a.v[i] + b.v[i]; }); }
DINO_FAST_INLINE Vec operator-(Vec a, Vec b) { return map([&](int i) { return a.v[i] - b.v[i]; }); }
DINO_FAST_INLINE Vec operator*(Vec a, Vec b) { return map([&](int i) { return a.v[i] * b.v[i]; }); }
DINO_FAST_INLINE Vec operator/(Vec a, Vec b) { return map([&](int i) { return a.v[i] / b.v[i]; }); }
DINO_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
DINO_FAST_INLINE Vec fnma(Vec a, Vec b, Vec c) { return map([&](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }
DINO_FAST_INLINE Vec max(Vec a, Vec b) { return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
DINO_FAST_INLINE Vec min(Vec a, Vec b) { return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
DINO_FAST_INLINE Vec sqrt(Vec a) { return map([&](int i) { return std::sqrt(a.v[i]); }); }
// Adding and taking away 1.5 * 2^23 rounds to an integer, |a| < 2^22, without a call to libm.
DINO_FAST_INLINE Vec round(Vec a) {
  return map([&](int i) { volatile float big = a.v[i] + 12582912.0f; return big - 12582912.0f; });
}
DINO_FAST_INLINE Vec times_power_of_two(Vec a, Vec n) {
  return map([&](int i) {
    const int whole = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0, half = whole >> 1, rest = whole - half;
    return a.v[i] * bits_to_float(static_cast<uint32_t>(half + 127) << 23) * bits_to_float(static_cast<uint32_t>(rest + 127) << 23);
  });
}
DINO_FAST_INLINE float reduce_add(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
DINO_FAST_INLINE float reduce_max(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < 8; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
DINO_FAST_INLINE void transpose_tile(const float* from, int64_t from_row, float* to, int64_t to_row) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
}

#endif

// While one lives, this thread takes float32 subnormals for 0, as inputs and as results: each costs an x86 processor over a
// hundred cycles, and the tails of a softmax are full of them. Everything below 1.2e-38 becomes 0; the halves are not concerned.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }  // FTZ, DAZ
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// The first n < width elements; the rest of the vector is `fill`. Only those n are touched in memory.
template <typename T> DINO_FAST_INLINE Vec load_first(const T* p, int n, float fill) {
  float buffer[Vec::width];
  for (int i = 0; i < Vec::width; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return load(buffer);
}
template <typename T> DINO_FAST_INLINE void store_first(T* p, int n, Vec x) {
  float buffer[Vec::width];
  store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(buffer[i]);
}

// 2^y for y <= 126, relative error below 1.7e-7 and 2^0 exactly 1: a degree-5 minimax polynomial in r = y - round(y)
// (9.2e-8), times 2^round(y). Below -150 it gives 0, -infinity included; NaN stays NaN.
DINO_FAST_INLINE Vec exp2(Vec y) {
#if defined(DINO_FAST_ISA_avx512)  // one instruction for r, which also takes -infinity
  const Vec r = _mm512_reduce_ps(y.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec n = y - r;
#else
  y = max(Vec(-150.0f), y);
  const Vec n = round(y);
  const Vec r = y - n;
#endif
  Vec p = fma(Vec(0.00132647275f), r, Vec(0.00967151264f));
  p = fma(p, r, Vec(0.0555073374f));
  p = fma(p, r, Vec(0.240222421f));
  p = fma(p, r, Vec(0.693146978f));
  p = fma(p, r, Vec(1.0f));
  return times_power_of_two(p, n);
}
DINO_FAST_INLINE Vec exp(Vec x) { return exp2(x * Vec(1.44269504088896341f)); }  // one more rounding, of x

}  // namespace DINO_FAST_ISA
}  // namespace dino_fast
