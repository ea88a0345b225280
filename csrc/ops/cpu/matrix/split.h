// Float32 matrices as tiles of three planes of bfloat16, which hold all bits of a number, and products of such tiles.
#pragma once

#include "matrix.h"

namespace {

// A matrix operand of fp32 rows, and how much of it there is.
struct Matrix {
  const float *data;
  int64_t rows, columns, stride;
};

#if defined(__AVX512BF16__)

static inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

#endif
#if defined(__AMX_TILE__)

constexpr int64_t PLANES = 3;

// 16 floats as the sum of three bfloat16 numbers, each in the upper half of its lane. The first two are rounded, half away
// from zero (the first towards zero, where it would become infinite), the third is what is left: exact, but where that is
// below 2^-126 and has bits in the lower half, which are cut off, as they would stand in the lane's neighbour. Infinity and
// NaN stay in the first.
static inline void split_lanes(__m512i (&planes)[PLANES], __m512 x) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __mmask16 finite = _mm512_fpclass_ps_mask(x, 0x99) ^ 0xffff;
  const __m512i bits = _mm512_castps_si512(x);
  planes[0] = _mm512_and_si512(_mm512_mask_add_epi32(bits, finite, bits, half), upper);
  const __mmask16 overflow = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(planes[0]), 0x18) & finite;
  planes[0] = _mm512_mask_and_epi32(planes[0], overflow, bits, upper);
  const __m512 rest = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(planes[0]));
  planes[1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  planes[2] = _mm512_and_si512(_mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(planes[1]))), upper);
}

// Two vectors of floats as pairs of bfloat16 numbers of the same lane, one vector a plane.
static inline void split_two(uint8_t *const (&to)[PLANES], __m512 low, __m512 high) {
  __m512i lows[PLANES], highs[PLANES];
  split_lanes(lows, low);
  split_lanes(highs, high);
  for (int64_t p = 0; p < PLANES; ++p)
    _mm512_storeu_si512(to[p], _mm512_or_si512(highs[p], _mm512_srli_epi32(lows[p], 16)));
}

// Rows [first, first + 16) as left tiles [plane][step][1024], with zeros for what is missing. In a step column j stands
// beside column j + 16; so it does in both operands of y = x w^T.
static void split_left(uint8_t *tiles, int64_t plane_bytes, const Matrix &x, int64_t first) {
  for (int64_t i = 0; i < TILE_SIDE; ++i) {
    const bool there = first + i < x.rows;
    const float *row = x.data + (there ? first + i : 0) * x.stride;
    uint8_t *to = tiles + i * STEP_BYTES;
    for (int64_t k = 0; k < x.columns; k += Bf16::step, to += TILE_BYTES) {
      const __mmask16 low = there ? first_lanes(x.columns - k) : 0, high = there ? first_lanes(x.columns - k - 16) : 0;
      split_two({to, to + plane_bytes, to + 2 * plane_bytes}, _mm512_maskz_loadu_ps(low, row + k),
                _mm512_maskz_loadu_ps(high, row + k + 16));
    }
  }
}

// c [32][32] (row stride in floats) = or += left x right over the steps; c lies inside its matrix.
static inline void multiply_whole(float *c, int64_t stride, bool add, Tiles a, int64_t a_plane, Tiles b, int64_t b_plane,
                                  int64_t steps) {
  load_sums(c, stride, add);
  add_split_products<2>(a, a_plane, b, b_plane, steps);
  store_sums(c, stride);
}

#endif

}  // namespace
