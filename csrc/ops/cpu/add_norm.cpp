// u = residual + dropout(x) and y = norm(u) on the CPU, one pass over the rows each way; the dropout mask is recomputed.
// An RMSNorm is a LayerNorm about 0 instead of the mean, without bias; it has no array of means.
#include <cstring>

#include "isa.h"
#include "norm_rows.h"
#include "rows.h"
#include "scratch.h"
#include "status.h"

namespace TL_ISA {

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int tl_add_norm_forward_cpu(const float *x, const float *residual, const float *weight, const float *bias, float *u,
                            float *y, float *mean, float *rstd, int64_t rows, int64_t width, int64_t x_stride,
                            int64_t residual_stride, double eps, double dropout_p, uint64_t seed, int threads) {
  const Dropout dropout(dropout_p, seed);
  for_each_row(rows, width, threads, [&](int64_t i) {
    float *sum = u + i * width, centre = 0.0f;
    add_dropped_row(x + i * x_stride, residual + i * residual_stride, sum, dropout, i, width);
    if (mean != nullptr) centre = mean[i] = mean_of_row(sum, width);
    rstd[i] = normalise_row(sum, centre, weight, bias, y + i * width, width, eps);
  });
  return TL_OK;
}

// Adds up the chunks' sums, [chunks, 2, width].
static void finish_sums(const double *partial, int64_t chunks, int64_t width, float *dweight, float *dbias) {
  for (int64_t j = 0; j < width; ++j) {
    double sum_dweight = 0.0, sum_dbias = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum_dweight += partial[2 * chunk * width + j];
      sum_dbias += partial[(2 * chunk + 1) * width + j];
    }
    dweight[j] = static_cast<float>(sum_dweight);
    if (dbias != nullptr) dbias[j] = static_cast<float>(sum_dbias);
  }
}

int tl_add_norm_backward_cpu(const float *du, const float *dy, const float *u, const float *mean, const float *rstd,
                             const float *weight, float *dx, float *dresidual, float *dweight, float *dbias,
                             int64_t rows, int64_t width, int64_t du_stride, int64_t dy_stride, double dropout_p,
                             uint64_t seed, int threads) {
  if (width == 0) return TL_OK;
  const Dropout dropout(dropout_p, seed);
  const int64_t chunk_rows = summed_chunk_rows(rows, width);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int64_t sum_size = chunks * 2 * width;
  Scratch block_memory(sum_size + 1);
  ScratchOf<double> chunk_memory(sum_size + 1);
  if (block_memory.data == nullptr || chunk_memory.data == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "add_norm: no memory for %lld sums", static_cast<long long>(sum_size));
  parallel_for(chunks, threads, [&](int64_t chunk) {
    float *block = block_memory.data + chunk * 2 * width;
    double *chunk_sums = chunk_memory.data + chunk * 2 * width;
    std::memset(block, 0, sizeof(float) * 2 * width);
    std::memset(chunk_sums, 0, sizeof(double) * 2 * width);
    const int64_t end = smaller(rows, (chunk + 1) * chunk_rows);
    for (int64_t i = chunk * chunk_rows; i < end; ++i) {
      const float *row_du = du == nullptr ? nullptr : du + i * du_stride, *row_dy = dy + i * dy_stride;
      const float *row_u = u + i * width, centre = mean == nullptr ? 0.0f : mean[i];
      float *row_dresidual = dresidual + i * width;
      RowMeans means = reduce_row(row_dy, row_u, weight, centre, rstd[i], block, block + width, width);
      if (i % BLOCK_ROWS == BLOCK_ROWS - 1 || i == end - 1) flush(block, chunk_sums, 2 * width);
      if (mean == nullptr) means.g = 0.0f;
      differentiate_row(row_du, row_dy, row_u, weight, centre, rstd[i], means, row_dresidual, width);
      if (dx != nullptr) drop_row(row_dresidual, dx + i * width, dropout, i, width);
    }
  });
  finish_sums(chunk_memory.data, chunks, width, dweight, dbias);
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
             (const float *du, const float *dy, const float *u, const float *mean, const float *rstd,
              const float *weight, float *dx, float *dresidual, float *dweight, float *dbias, int64_t rows,
              int64_t width, int64_t du_stride, int64_t dy_stride, double dropout_p, uint64_t seed, int threads),
             (du, dy, u, mean, rstd, weight, dx, dresidual, dweight, dbias, rows, width, du_stride, dy_stride,
              dropout_p, seed, threads))
