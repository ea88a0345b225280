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
