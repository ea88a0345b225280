// What a side block does to the rows of a strip between two products. Rows have a stride of whole blocks of 32 columns.
#pragma once

#include <algorithm>
#include <cstring>

#include "activation.h"
#include "norm_rows.h"
#include "rows.h"
#include "split.h"

namespace {

// Rows of floats that may be written.
struct RowsOf {
  float *data;
  int64_t stride;
  float *operator[](int64_t row) const { return data + row * stride; }
};

static void add_bias(const RowsOf &rows, const float *bias, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    float *row = rows[i];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) row[j] += bias[j];
  }
}

// As many numbers as vec.h has an exponential for; a compiler makes vectors of single ones.
#if defined(__AVX512F__)
typedef tl_lanes Numbers;
#else
typedef float Numbers;
#endif
constexpr int64_t NUMBERS = sizeof(Numbers) / sizeof(float);

static inline Numbers numbers_at(const float *from) {
  Numbers x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
static inline void put_numbers(float *to, Numbers x) { std::memcpy(to, &x, sizeof x); }

// x = activation(x + bias); whole blocks of columns.
template <class Activation>
static void activate_row(float *x, const float *bias, int64_t width, Activation) {
#pragma omp simd
  for (int64_t j = 0; j < width; j += NUMBERS)
    put_numbers(x + j, tl_activate<Activation::value>(numbers_at(x + j) + numbers_at(bias + j)));
}

// y = activation(x + bias), x = its slope there.
template <class Activation>
static void activate_row_with_slope(float *__restrict x, const float *__restrict bias, float *__restrict y,
                                    int64_t width, Activation) {
#pragma omp simd
  for (int64_t j = 0; j < width; j += NUMBERS) {
    const auto both = tl_activate_with_slope<Activation::value>(numbers_at(x + j) + numbers_at(bias + j));
    put_numbers(y + j, both.value);
    put_numbers(x + j, both.slope);
  }
}

static void multiply_rows(const RowsOf &to, const RowsOf &by, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    float *a = to[i];
    const float *b = by[i];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) a[j] *= b[j];
  }
}

// A LayerNorm or RMSNorm and, of the rows of a strip, what its gradient needs again.
struct Norm {
  const float *weight, *bias;
  bool rms;
  double eps;

  void apply(const float *u, float *y, int64_t width, float &centre, float &rstd) const {
    centre = rms ? 0.0f : mean_of_row(u, width);
    rstd = normalise_row(u, centre, weight, rms ? nullptr : bias, y, width, eps);
  }
};

// Sums over the rows of a group, as accurate as pairwise ones: in float over a few rows, then in double.
struct ColumnSums {
  float *block;
  double *total;
  int64_t width;

  void add(const RowsOf &rows, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const float *row = rows[i];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) block[j] += row[j];
      if (i % BLOCK_ROWS == BLOCK_ROWS - 1 || i == count - 1) flush(block, total, width);
    }
  }
};

// du = the gradient of norm(u) towards u; the weight's and the bias's are added to their sums.
static void differentiate_norm(const Norm &norm, const Matrix &dy, const Matrix &u, const float *centre,
                               const float *rstd, const RowsOf &du, const ColumnSums &weight, const ColumnSums &bias) {
  for (int64_t i = 0; i < dy.rows; ++i) {
    const float *row_dy = dy.data + i * dy.stride, *row_u = u.data + i * u.stride;
    RowMeans means = reduce_row(row_dy, row_u, norm.weight, centre[i], rstd[i], weight.block, bias.block, weight.width);
    if (norm.rms) means.g = 0.0f;
    differentiate_row(nullptr, row_dy, row_u, norm.weight, centre[i], rstd[i], means, du[i], weight.width);
    if (i % BLOCK_ROWS != BLOCK_ROWS - 1 && i != dy.rows - 1) continue;
    flush(weight.block, weight.total, weight.width);
    flush(bias.block, bias.total, bias.width);
  }
}

// to += from, over a strip.
template <class Rows>
static void add_rows(const Rows &to, const Matrix &from, int64_t width) {
  for (int64_t i = 0; i < from.rows; ++i) {
    float *a = to[i];
    const float *b = from.data + i * from.stride;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) a[j] += b[j];
  }
}

}  // namespace
