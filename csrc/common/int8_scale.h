// The scale of a row of int8 numbers: value = round(x / scale), scale = max |x| / 127.
#pragma once

#include <cmath>

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

}  // namespace
