// z = residual + dropout(x) on the CPU, and the gradient of x; the dropout mask is recomputed.
#include "isa.h"
#include "rows.h"
#include "tlfast.h"

namespace TL_ISA {

int tl_dropout_add_forward_cpu(const float *x, const float *residual, float *z, int64_t rows, int64_t width,
                               int64_t x_stride, int64_t residual_stride, double p, uint64_t seed, int threads) {
  const Dropout dropout(p, seed);
  for_each_row(rows, width, threads, [&](int64_t i) {
    add_dropped_row(x + i * x_stride, residual + i * residual_stride, z + i * width, dropout, i, width);
  });
  return TL_OK;
}

int tl_dropout_add_backward_cpu(const float *dz, float *dx, int64_t rows, int64_t width, int64_t dz_stride, double p,
                                uint64_t seed, int threads) {
  const Dropout dropout(p, seed);
  for_each_row(rows, width, threads,
               [&](int64_t i) { drop_row(dz + i * dz_stride, dx + i * width, dropout, i, width); });
  return TL_OK;
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_dropout_add_forward_cpu,
             (const float *x, const float *residual, float *z, int64_t rows, int64_t width, int64_t x_stride,
              int64_t residual_stride, double p, uint64_t seed, int threads),
             (x, residual, z, rows, width, x_stride, residual_stride, p, seed, threads))
TL_CPU_ENTRY(tl_dropout_add_backward_cpu,
             (const float *dz, float *dx, int64_t rows, int64_t width, int64_t dz_stride, double p, uint64_t seed,
              int threads),
             (dz, dx, rows, width, dz_stride, p, seed, threads))
