// total = x + residual and y = norm(total) on the CPU, and y in int8 where wanted: a row is read once, kept in float in
// the cache, and written once. An RMSNorm is a LayerNorm about 0 instead of the mean.
#include <cmath>

#include "isa.h"
#include "quantise.h"
#include "rows.h"

namespace TL_ISA {

// u = x in float; returns the sum over the row.
template <class T>
static float load_row(const T *x, float *u, int64_t width) {
  Sums sums;
  sweep(width, [&](auto kind, int64_t j, int part) TL_INLINE {
    const auto value = load<decltype(kind)>(x + j);
    store(u + j, value);
    sums.add(value, part);
  });
  return sums.total();
}

// u = x + residual in float, and total = that in T where it is wanted; returns the sum over the row.
template <bool Total, class T>
static float add_row(const T *x, const T *residual, float *u, T *total, int64_t width) {
  Sums sums;
  sweep(width, [&](auto kind, int64_t j, int part) TL_INLINE {
    const auto value = load<decltype(kind)>(x + j) + load<decltype(kind)>(residual + j);
    if constexpr (Total) store(total + j, value);
    store(u + j, value);
    sums.add(value, part);
  });
  return sums.total();
}

// A row's normal form is n = (u - centre) factor - shift.
struct Normal {
  float centre, factor, shift;
};

// About the centre and not as E[u^2] - mean^2, which cancels. A mean is rounded, by much where all of u is far from 0;
// what is left of it is in the deviations, whose own mean is taken off. This pass needs nothing from memory: meanwhile
// fetch_next(j) sends for what the next row has at j.
template <class Fetch>
static Normal normal_form(const float *u, float centre, int64_t width, bool rms, double eps, Fetch fetch_next) {
  Sums deviations, squares;
  sweep(width, [&](auto kind, int64_t j, int part) TL_INLINE {
    fetch_next(j);
    const auto d = load<decltype(kind)>(u + j) - centre;
    deviations.add(d, part);
    squares.add(d * d, part);
  });
  const double count = static_cast<double>(width), rest = rms ? 0.0 : deviations.total() / count;
  const double variance = squares.total() / count - rest * rest;  // below 0 only by rounding, of equal numbers
  const double factor = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + eps);
  return {centre, static_cast<float>(factor), static_cast<float>(rest * factor)};
}

// Calls body with affine(n, j) = n weight[j] + bias[j], of which either may be absent.
template <class Body>
static void with_affine(const float *weight, const float *bias, Body body) {
  const auto scaled = [=](auto n, int64_t j) TL_INLINE { return n * load<decltype(n)>(weight + j); };
  if (weight != nullptr && bias != nullptr)
    body([=](auto n, int64_t j) TL_INLINE { return scaled(n, j) + load<decltype(n)>(bias + j); });
  else if (weight != nullptr)
    body(scaled);
  else if (bias != nullptr)
    body([=](auto n, int64_t j) TL_INLINE { return n + load<decltype(n)>(bias + j); });
  else
    body([](auto n, int64_t) TL_INLINE { return n; });
}

template <class T, class Affine>
static void write_row(const float *u, Normal normal, Affine affine, T *y, int64_t width) {
  sweep(width, [&](auto kind, int64_t j, int) TL_INLINE {
    store(y + j, affine((load<decltype(kind)>(u + j) - normal.centre) * normal.factor - normal.shift, j));
  });
}

// The same, and y in int8 from before its rounding to T; u is overwritten. Returns the scale.
template <class T, class Affine>
static float write_quantised_row(float *u, Normal normal, Affine affine, T *y, int8_t *values, int64_t width) {
  Largest largest;
  sweep(width, [&](auto kind, int64_t j, int part) TL_INLINE {
    const auto exact = affine((load<decltype(kind)>(u + j) - normal.centre) * normal.factor - normal.shift, j);
    largest.add(exact, part);
    store(y + j, exact);
    store(u + j, exact);
  });
  const auto at = [=](auto kind, int64_t j) TL_INLINE { return load<decltype(kind)>(u + j); };
  return write_int8(at, largest.magnitude(), values, width);
}

int tl_norm_tap_cpu(const void *x, const void *residual, const float *weight, const float *bias, void *total, void *y,
                    int8_t *values, float *scale, int64_t rows, int64_t width, int64_t x_stride,
                    int64_t residual_stride, int dtype, int rms, double eps, int threads) {
  return tl_with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T *x_data = static_cast<const T *>(x);
    // x stands in for an absent residual, whose rows are then sent for but not added
    const T *residual_data = residual == nullptr ? x_data : static_cast<const T *>(residual);
    if (residual == nullptr) residual_stride = x_stride;
    T *y_data = static_cast<T *>(y), *total_data = static_cast<T *>(total);
    return for_each_row_with_scratch(rows, width, threads, [&](int64_t i, float *u) {
      const T *row_x = x_data + i * x_stride, *row_residual = residual_data + i * residual_stride;
      float sum;
      if (residual == nullptr)
        sum = load_row(row_x, u, width);
      else if (total == nullptr)
        sum = add_row<false>(row_x, row_residual, u, total_data, width);
      else
        sum = add_row<true>(row_x, row_residual, u, total_data + i * width, width);
      const float centre = rms ? 0.0f : sum / static_cast<float>(width);
      const int64_t next = i + 1 < rows ? i + 1 : i;
      const T *next_x = x_data + next * x_stride, *next_residual = residual_data + next * residual_stride;
      const Normal normal = normal_form(u, centre, width, rms, eps, [=](int64_t j) TL_INLINE {
        __builtin_prefetch(next_x + j);
        __builtin_prefetch(next_residual + j);
      });
      T *row_y = y_data + i * width;
      with_affine(weight, bias, [&](auto affine) {
        if (values == nullptr)
          write_row(u, normal, affine, row_y, width);
        else
          scale[i] = write_quantised_row(u, normal, affine, row_y, values + i * width, width);
      });
    });
  });
}

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_norm_tap_cpu,
                (const void *x, const void *residual, const float *weight, const float *bias, void *total, void *y,
                 int8_t *values, float *scale, int64_t rows, int64_t width, int64_t x_stride, int64_t residual_stride,
                 int dtype, int rms, double eps, int threads),
                (x, residual, weight, bias, total, y, values, scale, rows, width, x_stride, residual_stride, dtype, rms,
                 eps, threads))
