// Activations of feed-forwards, written so that loops over them vectorise.
#pragma once

#include "dtype.h"
#include "tlfast.h"
#include "vec.h"

// A loop does not vectorise over a call that was not inlined.
#define TL_INLINED __attribute__((always_inline)) static inline

// erf(x) to about 1 ulp: an odd polynomial near 0, else 1 - exp(polynomial), both of the least maximum error.
TL_INLINED float tl_erff(float x) {
  const float a = tl_bits_float(tl_float_bits(x) & 0x7fffffffu), square = x * x;
  float far = -1.72853470e-5f * a + 3.83197126e-4f;
  far = far * square + (-3.88396438e-3f * a + 2.42546219e-2f);
  far = far * a - 1.06777877e-1f;
  far = far * a - 6.34846687e-1f;
  far = far * a - 1.28717512e-1f;
  far = 1.0f - tl_expf(far * a - a);
  far = tl_bits_float(tl_float_bits(far) | (tl_float_bits(x) & 0x80000000u));
  float near = -5.96761703e-4f;
  near = near * square + 4.99119423e-3f;
  near = near * square - 2.67681349e-2f;
  near = near * square + 1.12819925e-1f;
  near = near * square - 3.76125336e-1f;
  near = near * square + 1.28379166e-1f;
  near = near * x + x;
  return a > 0.921875f ? far : near;
}

TL_INLINED float tl_sigmoid(float x) { return 1.0f / (1.0f + tl_expf(-x)); }

// GELU for a result that is rounded to bfloat16: to 1e-4, a fortieth of what rounding does to a number of size 1. Phi(x) -
// 1/2 is x times a polynomial of x^2 up to |x| = 4.75, where it reaches 1/2 and stays.
TL_INLINED float tl_gelu_for_bf16(float x) {
  const float low = x < -4.75f ? -4.75f : x, bounded = low > 4.75f ? 4.75f : low, square = bounded * bounded;
  float half = -8.8193786e-13f;
  half = half * square + 1.1797391e-10f;
  half = half * square + -7.0063892e-09f;
  half = half * square + 2.4500096e-07f;
  half = half * square + -5.6550834e-06f;
  half = half * square + 9.1798676e-05f;
  half = half * square + -0.0010915196f;
  half = half * square + 0.00974346f;
  half = half * square + -0.066211626f;
  half = half * square + 0.39882413f;
  half *= bounded;
  half = x < -4.75f ? -0.5f : half;
  half = x > 4.75f ? 0.5f : half;
  return x * half + 0.5f * x;
}

template <int Activation>
TL_INLINED float tl_activate(float x) {
  if constexpr (Activation == TL_GELU) return 0.5f * x * (1.0f + tl_erff(x * 0.70710678f));
  // 0.5 (1 + tanh(u)) is sigmoid(2u)
  if constexpr (Activation == TL_GELU_TANH) return x * tl_sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  if constexpr (Activation == TL_QUICK_GELU) return x * tl_sigmoid(1.702f * x);
  if constexpr (Activation == TL_RELU) return x < 0.0f ? 0.0f : x;
  if constexpr (Activation == TL_SILU) return x * tl_sigmoid(x);
  return x;
}
