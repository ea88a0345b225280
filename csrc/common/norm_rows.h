// LayerNorm and RMSNorm of a row of floats, and their gradient. An RMSNorm is a LayerNorm about 0 instead of the mean,
// without bias.
#pragma once

#include <cmath>
#include <cstdint>

namespace {

static float mean_of_row(const float *u, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) sum += u[j];
  return sum / static_cast<float>(width);
}

// Returns 1/deviation, the factor of the row.
static float normalise_row(const float *u, float centre, const float *weight, const float *bias, float *y,
                           int64_t width, double eps) {
  float squares = 0.0f;
  // About the mean and not as E[u^2] - mean^2, which cancels; the row is in the cache.
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < width; ++j) squares += (u[j] - centre) * (u[j] - centre);
  const double variance = static_cast<double>(squares) / static_cast<double>(width);
  const float scale = static_cast<float>(1.0 / std::sqrt(variance + eps));
  if (bias == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) y[j] = (u[j] - centre) * scale * weight[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) y[j] = (u[j] - centre) * scale * weight[j] + bias[j];
  }
  return scale;
}

// The means over a row, of g = dy weight and of g n, n = (u - centre) rstd; and the row's part in dweight and dbias.
struct RowMeans {
  float g, gn;
};

static RowMeans reduce_row(const float *__restrict dy, const float *__restrict u, const float *__restrict weight,
                           float centre, float rstd, float *__restrict sum_dweight, float *__restrict sum_dbias,
                           int64_t width) {
  float sum_g = 0.0f, sum_gn = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gn)
  for (int64_t j = 0; j < width; ++j) {
    const float n = (u[j] - centre) * rstd, g = dy[j] * weight[j];
    sum_g += g;
    sum_gn += g * n;
    sum_dweight[j] += dy[j] * n;
    sum_dbias[j] += dy[j];
  }
  return {sum_g / static_cast<float>(width), sum_gn / static_cast<float>(width)};
}

// dresidual = du + rstd (g - mean(g) - n mean(g n)); du may be null.
static void differentiate_row(const float *__restrict du, const float *__restrict dy, const float *__restrict u,
                              const float *__restrict weight, float centre, float rstd, RowMeans means,
                              float *__restrict dresidual, int64_t width) {
  if (du == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j)
      dresidual[j] = rstd * (dy[j] * weight[j] - means.g - (u[j] - centre) * rstd * means.gn);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j)
      dresidual[j] = du[j] + rstd * (dy[j] * weight[j] - means.g - (u[j] - centre) * rstd * means.gn);
  }
}

}  // namespace
