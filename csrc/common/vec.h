// Elementary functions written so that a loop over them vectorises (libm's do not without -ffast-math).
#pragma once

#include "dtype.h"

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
