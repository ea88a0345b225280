// Half-precision storage types for CPU kernels: load to float, compute in float, round once on the store.
// The conversions are branch-free integer code, so loops over them vectorise on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "status.h"
#include "tlfast.h"

struct tl_bf16 {
  uint16_t bits;
};
struct tl_f16 {
  uint16_t bits;
};

static inline uint32_t tl_float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float tl_bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float tl_load(float x) { return x; }

static inline float tl_load(tl_bf16 x) { return tl_bits_float(static_cast<uint32_t>(x.bits) << 16); }

static inline float tl_load(tl_f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  const uint32_t finite = tl_float_bits(tl_bits_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their payload
  return tl_bits_float(sign | (magnitude >= (0x7c00u << 13) ? special : finite));
}

static inline void tl_store(float *to, float x) { *to = x; }

static inline void tl_store(tl_bf16 *to, float x) {
  const uint32_t bits = tl_float_bits(x);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x0040u;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest_even);
}

static inline void tl_store(tl_f16 *to, float x) {
  const uint32_t bits = tl_float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent, round to nearest even; a carry out of the largest one gives infinity.
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 leaves the value, rounded to a multiple of 2^-24, in the low mantissa bits.
  const uint32_t subnormal = tl_float_bits(tl_bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->bits = static_cast<uint16_t>(sign | half);
}

// Calls body(element) with a value of the C++ type that a tl_dtype code names; body returns a status.
template <class Body>
static inline int tl_with_dtype(int dtype, Body body) {
  switch (dtype) {
    case TL_F32:
      return body(float{});
    case TL_F16:
      return body(tl_f16{});
    case TL_BF16:
      return body(tl_bf16{});
    default:
      return tl_fail(TL_BAD_ARGUMENT, "unknown dtype code %d", dtype);
  }
}
