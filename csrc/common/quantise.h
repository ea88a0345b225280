// A row of numbers in int8 with one scale: value = round(x / scale), scale = max |x| / 127.
#pragma once

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace {

constexpr float INT8_LARGEST = 127.0f;
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it leaves x, rounded to nearest even, in the low bits

struct RowScale {
  float scale;
  float inverse;  // 0 where no value but 0 can be told: a row of zeros, or one that holds NaN or infinity
};

inline RowScale int8_scale(float largest) {
  const float scale = largest / INT8_LARGEST;
  if (scale < 0x1p-126f) return {0.0f, 0.0f};
  return {scale, std::isfinite(scale) ? INT8_LARGEST / largest : 0.0f};
}

inline TL_INLINE void store_int8(int8_t *to, Lanes rounded) {
#if defined(__AVX512F__)
  copy_to(to, _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(rounded)));
#else
  typedef int8_t LaneBytes __attribute__((vector_size(TL_WIDE)));
  copy_to(to, __builtin_convertvector(bits_of(rounded), LaneBytes));
#endif
}
inline TL_INLINE void store_int8(int8_t *to, float rounded) { *to = static_cast<int8_t>(bits_of(rounded) & 0xffu); }

// Writes the row whose elements at(kind, j) gives and whose largest magnitude is `largest`; returns its scale.
template <class At>
inline TL_INLINE float write_int8(At at, float largest, int8_t *values, int64_t width) {
  const RowScale row = int8_scale(largest);
  if (row.inverse == 0.0f) {
    std::memset(values, 0, static_cast<size_t>(width));
    return row.scale;
  }
  sweep(width, [&](auto kind, int64_t j, int) TL_INLINE {
    const auto scaled = at(kind, j) * row.inverse;
    // at most 127, but for its own rounding; the comparison keeps the sum below from being fused with that product,
    // which would round another number on other instruction sets
    const auto bounded = smaller(scaled, INT8_LARGEST);
    store_int8(values + j, bounded + ROUNDER);
  });
  return row.scale;
}

}  // namespace
