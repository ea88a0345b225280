// y = LayerNorm(residual + dropout(x)) on the CPU, one pass over the rows each way; the dropout mask is recomputed.
#include <cmath>
#include <cstring>

#include "dropout.h"
#include "dtype.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace TL_ISA {

// Elements a chunk of work holds: enough to hide the hand-out, little enough to balance the threads.
static constexpr int64_t CHUNK_ELEMENTS = 8192;
// The backward sums each of at most so many chunks apart, then those in order: the same bits for any thread count.
static constexpr int64_t MAX_PARTIAL_SUMS = 64;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Dropout {
  uint32_t threshold;
  float kept;  // 1/(1-p), the factor of what stays
  uint64_t seed;
  Dropout(double p, uint64_t s)
      : threshold(tl_dropout_threshold(p)), kept(static_cast<float>(1.0 / (1.0 - p))), seed(s) {}
};

static void add_row(const float *x, const float *residual, float *u, const Dropout &dropout, int64_t row,
                    int64_t width) {
  if (dropout.threshold == 0) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) u[j] = residual[j] + x[j];
    return;
  }
  const uint32_t key = tl_dropout_row_key(dropout.seed, static_cast<uint64_t>(row)), threshold = dropout.threshold;
  const float kept = dropout.kept;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    u[j] = residual[j] + (tl_dropout_keep(key, static_cast<uint32_t>(j), threshold) ? kept * x[j] : 0.0f);
}

static void normalise_row(const float *u, const float *weight, const float *bias, float *y, int64_t width, double eps,
                          float *mean, float *rstd) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) sum += u[j];
  const float centre = sum / static_cast<float>(width);
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
  *mean = centre;
  *rstd = scale;
}

int tl_add_norm_forward_cpu(const float *x, const float *residual, const float *weight, const float *bias, float *u,
                            float *y, float *mean, float *rstd, int64_t rows, int64_t width, int64_t x_stride,
                            int64_t residual_stride, double eps, double dropout_p, uint64_t seed, int threads) {
  if (rows == 0 || width == 0) return TL_OK;
  const Dropout dropout(dropout_p, seed);
  const int64_t chunk_rows = larger(1, CHUNK_ELEMENTS / width);
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t chunk) {
    for (int64_t i = chunk * chunk_rows; i < smaller(rows, (chunk + 1) * chunk_rows); ++i) {
      add_row(x + i * x_stride, residual + i * residual_stride, u + i * width, dropout, i, width);
      normalise_row(u + i * width, weight, bias, y + i * width, width, eps, mean + i, rstd + i);
    }
  });
  return TL_OK;
}

// du = rstd (g - mean(g) - n mean(g n)) with g = dy weight and n = (u - mean) rstd; dx = du times the dropout mask.
static void backward_row(const float *__restrict dy, const float *__restrict u, const float *__restrict weight,
                         float mean, float rstd, float *__restrict du, float *__restrict sum_dweight,
                         float *__restrict sum_dbias, int64_t width) {
  float sum_g = 0.0f, sum_gn = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gn)
  for (int64_t j = 0; j < width; ++j) {
    const float n = (u[j] - mean) * rstd, g = dy[j] * weight[j];
    sum_g += g;
    sum_gn += g * n;
    sum_dweight[j] += dy[j] * n;
    sum_dbias[j] += dy[j];
  }
  const float mean_g = sum_g / static_cast<float>(width), mean_gn = sum_gn / static_cast<float>(width);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    du[j] = rstd * (dy[j] * weight[j] - mean_g - (u[j] - mean) * rstd * mean_gn);
}

static void drop_row(const float *__restrict du, float *__restrict dx, const Dropout &dropout, int64_t row,
                     int64_t width) {
  const uint32_t key = tl_dropout_row_key(dropout.seed, static_cast<uint64_t>(row)), threshold = dropout.threshold;
  const float kept = dropout.kept;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    dx[j] = tl_dropout_keep(key, static_cast<uint32_t>(j), threshold) ? kept * du[j] : 0.0f;
}

int tl_add_norm_backward_cpu(const float *dy, const float *u, const float *mean, const float *rstd,
                             const float *weight, float *dx, float *dresidual, float *dweight, float *dbias,
                             int64_t rows, int64_t width, int64_t dy_stride, double dropout_p, uint64_t seed,
                             int threads) {
  if (width == 0) return TL_OK;
  const Dropout dropout(dropout_p, seed);
  const int64_t fewest_rows = (rows + MAX_PARTIAL_SUMS - 1) / MAX_PARTIAL_SUMS;
  const int64_t chunk_rows = larger(larger(1, CHUNK_ELEMENTS / width), fewest_rows);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  Scratch partial(2 * chunks * width + 1);
  if (partial.data == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "add_norm: no memory for %lld sums", 2LL * chunks * width);
  parallel_for(chunks, threads, [&](int64_t chunk) {
    float *sum_dweight = partial.data + 2 * chunk * width, *sum_dbias = sum_dweight + width;
    std::memset(sum_dweight, 0, sizeof(float) * 2 * width);
    for (int64_t i = chunk * chunk_rows; i < smaller(rows, (chunk + 1) * chunk_rows); ++i) {
      float *du = dresidual + i * width;
      backward_row(dy + i * dy_stride, u + i * width, weight, mean[i], rstd[i], du, sum_dweight, sum_dbias, width);
      if (dx != nullptr) drop_row(du, dx + i * width, dropout, i, width);
    }
  });
  for (int64_t j = 0; j < width; ++j) {
    double total_dweight = 0.0, total_dbias = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total_dweight += partial.data[2 * chunk * width + j];
      total_dbias += partial.data[(2 * chunk + 1) * width + j];
    }
    dweight[j] = static_cast<float>(total_dweight);
    if (dbias != nullptr) dbias[j] = static_cast<float>(total_dbias);
  }
  return TL_OK;
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_add_norm_forward_cpu,
             (const float *x, const float *residual, const float *weight, const float *bias, float *u, float *y,
              float *mean, float *rstd, int64_t rows, int64_t width, int64_t x_stride, int64_t residual_stride,
              double eps, double dropout_p, uint64_t seed, int threads),
             (x, residual, weight, bias, u, y, mean, rstd, rows, width, x_stride, residual_stride, eps, dropout_p, seed,
              threads))
TL_CPU_ENTRY(tl_add_norm_backward_cpu,
             (const float *dy, const float *u, const float *mean, const float *rstd, const float *weight, float *dx,
              float *dresidual, float *dweight, float *dbias, int64_t rows, int64_t width, int64_t dy_stride,
              double dropout_p, uint64_t seed, int threads),
             (dy, u, mean, rstd, weight, dx, dresidual, dweight, dbias, rows, width, dy_stride, dropout_p, seed,
              threads))
