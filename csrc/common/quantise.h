// A row of numbers in int8 with one scale: value = round(x / scale), scale = max |x| / 127.
#pragma once

#include <cstring>

#include "int8_scale.h"
#include "lanes.h"

namespace {

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
