// Activations of feed-forwards, written so that loops over them vectorise.
#pragma once

#include "dtype.h"
#include "tlfast.h"
#include "vec.h"

// A loop does not vectorise over a call that was not inlined.
#define TL_INLINED __attribute__((always_inline)) static inline

// Each takes a float, or a vector of them where vec.h has their exponential.

// erf(x) to about 1 ulp: an odd polynomial near 0, else 1 - exp(polynomial), both of the least maximum error.
template <class V>
TL_INLINED V tl_erf(V x) {
  const V a = x < 0.0f ? -x : x, square = x * x;
  V far = -1.72853470e-5f * a + 3.83197126e-4f;
  far = far * square + (-3.88396438e-3f * a + 2.42546219e-2f);
  far = far * a - 1.06777877e-1f;
  far = far * a - 6.34846687e-1f;
  far = far * a - 1.28717512e-1f;
  far = 1.0f - tl_exponential(far * a - a);
  far = x < 0.0f ? -far : far;
  V near = -5.96761703e-4f * square + 4.99119423e-3f;
  near = near * square - 2.67681349e-2f;
  near = near * square + 1.12819925e-1f;
  near = near * square - 3.76125336e-1f;
  near = near * square + 1.28379166e-1f;
  near = near * x + x;
  return a > 0.921875f ? far : near;
}

template <class V>
TL_INLINED V tl_sigmoid(V x) {
  return 1.0f / (1.0f + tl_exponential(-x));
}

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

template <int Activation, class V>
TL_INLINED V tl_activate(V x) {
  if constexpr (Activation == TL_GELU) return 0.5f * x * (1.0f + tl_erf(x * 0.70710678f));
  // 0.5 (1 + tanh(u)) is sigmoid(2u)
  if constexpr (Activation == TL_GELU_TANH) return x * tl_sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  if constexpr (Activation == TL_QUICK_GELU) return x * tl_sigmoid(1.702f * x);
  if constexpr (Activation == TL_RELU) return x < 0.0f ? V{} : x;
  if constexpr (Activation == TL_SILU) return x * tl_sigmoid(x);
  return x;
}

// The activation and its slope, which share what is dear.
template <class V>
struct tl_activated {
  V value, slope;
};
template <int Activation, class V>
TL_INLINED tl_activated<V> tl_activate_with_slope(V x) {
  if constexpr (Activation == TL_GELU) {
    const V phi = 0.5f * (1.0f + tl_erf(x * 0.70710678f));
    return {x * phi, phi + x * 0.39894228f * tl_exponential(-0.5f * x * x)};
  }
  if constexpr (Activation == TL_GELU_TANH) {
    const V square = x * x, s = tl_sigmoid(1.59576912f * (x + 0.044715f * x * square));
    return {x * s, s + x * s * (1.0f - s) * (1.59576912f + 0.21406537f * square)};
  }
  if constexpr (Activation == TL_QUICK_GELU || Activation == TL_SILU) {
    constexpr float factor = Activation == TL_SILU ? 1.0f : 1.702f;
    const V s = tl_sigmoid(factor * x);
    return {x * s, s + factor * x * s * (1.0f - s)};
  }
  if constexpr (Activation == TL_RELU) return {x < 0.0f ? V{} : x, x > 0.0f ? V{} + 1.0f : V{}};
  return {x, V{} + 1.0f};
}

// Calls body(constant) with the tl_activation as a compile-time constant; false where the code is unknown.
template <int Activation>
struct tl_activation_constant {
  static constexpr int value = Activation;
};
template <class Body>
static inline bool tl_with_activation(int64_t activation, Body body) {
  switch (activation) {
    case TL_GELU:
      return body(tl_activation_constant<TL_GELU>{}), true;
    case TL_GELU_TANH:
      return body(tl_activation_constant<TL_GELU_TANH>{}), true;
    case TL_QUICK_GELU:
      return body(tl_activation_constant<TL_QUICK_GELU>{}), true;
    case TL_RELU:
      return body(tl_activation_constant<TL_RELU>{}), true;
    case TL_SILU:
      return body(tl_activation_constant<TL_SILU>{}), true;
    default:
      return false;
  }
}
