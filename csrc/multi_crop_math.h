// The arithmetic of one pixel of multi_crop, for C++ and CUDA alike; Pillow's to the bit (see dino_fast/ops/multi_crop/__init__.py).
//
// Compile with -ffp-contract=off (--fmad=false): a fused multiply-add rounds once where Pillow's two steps round twice, and
// the result is then cut off to an integer.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DINO_FAST_PIXEL __host__ __device__ inline
#else
#define DINO_FAST_PIXEL inline __attribute__((always_inline))
#endif

namespace dino_fast {
namespace pixel {

DINO_FAST_PIXEL int least(int a, int b) { return a < b ? a : b; }
DINO_FAST_PIXEL int most(int a, int b) { return a > b ? a : b; }
DINO_FAST_PIXEL int clip(int x) { return x < 0 ? 0 : x > 255 ? 255 : x; }

// Resampling: coefficients are whole multiples of 2^-22, summed in 32 bits, rounded half up.
constexpr int kCoefficientBits = 22;

// Keys' cubic with a = -1/2, at distance x in units of the source's (or, shrinking, the result's) pixels.
DINO_FAST_PIXEL double cubic(double x) {
  x = x < 0 ? -x : x;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
  return 0;
}

// Source pixels [first, first + count) make pixel `at` of `to` along an axis that had `from`.
struct Taps {
  double centre, step;  // step: 1 / how much the filter is stretched
  int first, count;
};
DINO_FAST_PIXEL Taps taps(int at, int from, int to) {
  const double scale = static_cast<double>(from) / to, stretch = scale < 1 ? 1 : scale, support = 2 * stretch;
  const double centre = (at + 0.5) * scale;
  const int first = most(static_cast<int>(centre - support + 0.5), 0);
  return {centre, 1 / stretch, first, least(static_cast<int>(centre + support + 0.5), from) - first};
}
DINO_FAST_PIXEL double weight(const Taps& t, int i) { return cubic((i + t.first - t.centre + 0.5) * t.step); }
DINO_FAST_PIXEL int to_fixed(double w) {
  return static_cast<int>((w < 0 ? -0.5 : 0.5) + w * (1 << kCoefficientBits));
}

// Whether columns are resampled before rows: since Pillow 13, where the height shrinks by more than twice as many pixels as
// the width. The 8 bits between the two passes make the order visible, by a few levels here and there.
DINO_FAST_PIXEL bool down_first(int64_t lost_height, int64_t lost_width) {
  return lost_height > 0 && lost_height > 2 * lost_width;
}

// From `other` (factor 0) to `value` (factor 1) and beyond, cut off to an integer.
DINO_FAST_PIXEL int blend(int other, int value, float factor) {
  const float mixed = static_cast<float>(other) + factor * static_cast<float>(value - other);
  return clip(static_cast<int>(mixed));
}

DINO_FAST_PIXEL int luma(int r, int g, int b) { return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; }

// (level / 255 - mean) / std, but for the last bits of a float.
struct Normal {
  float zero, scale;
};
DINO_FAST_PIXEL Normal normal(float mean, float std) {
  return {static_cast<float>(255.0 * mean), static_cast<float>(1.0 / (255.0 * std))};
}
DINO_FAST_PIXEL float normalised(const Normal& n, int level) { return (static_cast<float>(level) - n.zero) * n.scale; }

// Hue turned by turn / 256, by way of 8-bit hue and saturation (of 255). There are no branches, so that loops over it
// vectorise, and no double precision, where Pillow has some: of every colour and every turn the 8 bits are the same.
DINO_FAST_PIXEL void turn_hue(int& r, int& g, int& b, int turn) {
  const int high = most(r, most(g, b)), low = least(r, least(g, b)), range = high - low;
  const int is_red = r == high, is_green = (1 - is_red) & (g == high), is_blue = 1 - is_red - is_green;
  const int ahead = high - ((-is_red & b) | (-is_green & r) | (-is_blue & g));
  const int behind = high - ((-is_red & g) | (-is_green & b) | (-is_blue & r));
  // (ahead - behind) / range, one of which is the range itself: taken out as a whole number, it costs no rounding.
  const int plus = ahead == range, minus = behind == range;
  const float part = static_cast<float>(((plus - 1) & ahead) - ((minus - 1) & behind)) / static_cast<float>(most(range, 1));
  const float turns = (static_cast<float>(2 * is_green + 4 * is_blue + plus - minus) + part) / 6.0f;
  const int hue = static_cast<int>((turns + static_cast<float>(turns < 0)) * 255.0f);  // 0 for greys
  const int saturation = static_cast<int>(static_cast<float>(range * 255) / static_cast<float>(most(high, 1)));

  const int sixfold = ((hue + turn) & 255) * 6, sector = sixfold * 257 / 65535, odd = sector & 1;  // = sixfold / 255
  const float v = static_cast<float>(high), s = static_cast<float>(saturation) / 255.0f;
  const float f = static_cast<float>(sixfold - 255 * sector) / 255.0f, fall = odd ? f : 1.0f - f;
  const int p = static_cast<int>(v * (1.0f - s) + 0.5f), m = static_cast<int>(v * (1.0f - s * fall) + 0.5f);
  const int one = -(sector == 1), two = -(sector == 2), three = -(sector == 3), four = -(sector == 4), five = -(sector == 5);
  const int none = ~(one | two | three | four | five);  // a whole turn, sector 6, is none; masks of all bits
  r = ((none | five) & high) | ((one | four) & m) | ((two | three) & p);
  g = ((one | two) & high) | ((none | three) & m) | ((four | five) & p);
  b = ((three | four) & high) | ((two | five) & m) | ((none | one) & p);
}

// Gaussian blur as three box blurs, each of 2 radius + 1 whole pixels and a fraction of the next one on either side
// (Gwosdek et al. 2011, equations 7, 11, 14). Weights are multiples of 2^-24.
struct Box {
  int radius;
  uint32_t whole, fraction;
};
DINO_FAST_PIXEL Box box_of(float deviation) {
  const float variance = deviation * deviation / 3;
  const float length = static_cast<float>(sqrt(12.0 * variance + 1.0));
  const float l = static_cast<float>(floor((length - 1.0) / 2.0));
  float a = (2 * l + 1) * (l * (l + 1) - 3 * variance);
  a /= 6 * (variance - (l + 1) * (l + 1));
  const float r = l + a;
  const int radius = static_cast<int>(r);
  const uint32_t whole = static_cast<uint32_t>(static_cast<float>(1 << 24) / (r * 2 + 1));
  return {radius, whole, ((1u << 24) - static_cast<uint32_t>(radius * 2 + 1) * whole) / 2};
}
DINO_FAST_PIXEL uint8_t box_mean(const Box& box, uint32_t sum, uint32_t ends) {
  return static_cast<uint8_t>((sum * box.whole + ends * box.fraction + (1u << 23)) >> 24);
}

}  // namespace pixel
}  // namespace dino_fast
