// Elementary functions written so that a loop over them vectorises (libm's do not without -ffast-math).
#pragma once

#include "dtype.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// exp(x) to about 1 ulp: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial in r, scaled by 2^n. Results below the
// smallest normal number are flushed to 0 (so exp(-inf) is 0), above the largest finite are inf; NaN stays NaN.
__attribute__((always_inline)) static inline float tl_expf(float x) {
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.33654f ? -87.33654f : x > 88.72283f ? 88.72283f : x;
  const float shifted = clamped * 1.44269504f + shifter;
  const float n = shifted - shifter;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float poly = 1.38888890e-3f;
  poly = poly * r + 8.33333377e-3f;
  poly = poly * r + 4.16666679e-2f;
  poly = poly * r + 1.66666667e-1f;
  poly = poly * r + 0.5f;
  poly = poly * (r * r) + r + 1.0f;
  // n can be 128, which 2^n cannot hold: scale by 2^(n-1) and by 2.
  const uint32_t exponent = (tl_float_bits(shifted) - tl_float_bits(shifter) + 126u) << 23;
  const float scaled = poly * tl_bits_float(exponent) * 2.0f;
  const float low = x < -87.33654f ? 0.0f : scaled;
  return x > 88.72283f ? tl_bits_float(0x7f800000u) : low;
}

#if defined(__AVX512F__)

typedef float tl_lanes __attribute__((vector_size(64)));

// The same of 16 numbers, with AVX-512's own rounding and scaling: half the instructions. NaN stays NaN.
__attribute__((always_inline)) static inline tl_lanes tl_exponential(tl_lanes x) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), bounded);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 poly = _mm512_fmadd_ps(_mm512_set1_ps(1.38888890e-3f), r, _mm512_set1_ps(8.33333377e-3f));
  constexpr float coefficients[] = {4.16666679e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
  for (const float coefficient : coefficients)
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(poly, n);
}

#endif

__attribute__((always_inline)) static inline float tl_exponential(float x) { return tl_expf(x); }
