// Rows in int8 with a scale each, on the CPU: a row is read twice, the second time from the cache.
#include "isa.h"
#include "quantise.h"
#include "rows.h"

namespace TL_ISA {

template <class At>
static float quantise_row(At at, int8_t *values, int64_t width) {
  Largest largest;
  sweep(width, [&](auto kind, int64_t j, int part) TL_INLINE { largest.add(at(kind, j), part); });
  return write_int8(at, largest.magnitude(), values, width);
}

int tl_quantise_rows_cpu(const void *x, const float *smooth, int8_t *values, float *scale, int64_t rows, int64_t width,
                         int64_t x_stride, int dtype, int threads) {
  return tl_with_dtype(dtype, [&](auto element) {
    const auto *data = static_cast<const decltype(element) *>(x);
    for_each_row(rows, width, threads, [&](int64_t i) {
      const auto *row = data + i * x_stride;
      const auto plain = [=](auto kind, int64_t j) TL_INLINE { return load<decltype(kind)>(row + j); };
      const auto smoothed = [=](auto kind, int64_t j)
                                TL_INLINE { return plain(kind, j) * load<decltype(kind)>(smooth + j); };
      int8_t *to = values + i * width;
      scale[i] = smooth == nullptr ? quantise_row(plain, to, width) : quantise_row(smoothed, to, width);
    });
    return static_cast<int>(TL_OK);
  });
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_quantise_rows_cpu,
             (const void *x, const float *smooth, int8_t *values, float *scale, int64_t rows, int64_t width,
              int64_t x_stride, int dtype, int threads),
             (x, smooth, values, scale, rows, width, x_stride, dtype, threads))
