// Contrastive losses on the CPU: what is done to a tile of products u_i . v_j, which PyTorch's or tlfast's matrix product
// wrote. s = scale product; the pair (i, i + diagonal) belongs together and is kept apart from the sums over the others.
//
// Rows are one task's and columns another's, so sums have the same bits for any number of threads.
#include <cstring>

#include "activation.h"
#include "isa.h"
#include "parallel.h"
#include "status.h"
#include "tlfast.h"
#include "vec.h"

namespace TL_ISA {

static constexpr int64_t STRIP_ROWS = 16;     // rows a task takes at a time
static constexpr int64_t STRIP_COLUMNS = 64;  // columns a task takes at a time
static constexpr int64_t PARTS = 16;          // sums along a row that do not wait for each other

struct Tile {
  float *first;
  int64_t rows, columns, stride, diagonal;
  float scale;

  float *row(int64_t i) const { return first + i * stride; }
  bool has_own(int64_t i) const { return i + diagonal >= 0 && i + diagonal < columns; }
};

template <class Body>
static void for_each_strip(int64_t count, int64_t size, int threads, Body body) {
  parallel_for((count + size - 1) / size, threads, [&](int64_t strip) {
    const int64_t first = strip * size;
    body(first, first + size < count ? first + size : count);
  });
}

// log1p(x) for x in [0, 1] to about 1 ulp, relative also near 0: 2 artanh(t), t = x / (2 + x) <= 1/3.
TL_INLINED float tl_log1pf(float x) {
  const float t = x / (2.0f + x), square = t * t;
  float sum = 1.0f / 15.0f;
  sum = sum * square + 1.0f / 13.0f;
  sum = sum * square + 1.0f / 11.0f;
  sum = sum * square + 1.0f / 9.0f;
  sum = sum * square + 1.0f / 7.0f;
  sum = sum * square + 1.0f / 5.0f;
  sum = sum * square + 1.0f / 3.0f;
  return 2.0f * t + 2.0f * t * square * sum;
}

// ---- softmax: running maximum and sum of exponentials of a row or column ----

// exp(-inf - shift) is 0 where nothing was seen yet: a shift of -inf would give NaN.
TL_INLINED float finite_shift(float maximum) { return maximum == -__builtin_inff() ? 0.0f : maximum; }

TL_INLINED float sum_of(const float *parts) {
  float sum[PARTS / 2];
  for (int64_t p = 0; p < PARTS / 2; ++p) sum[p] = parts[p] + parts[p + PARTS / 2];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Scales a row in place, takes its own pair out (-inf) and adds the rest to the row's maximum and sum.
static void reduce_row(const Tile &tile, int64_t i, float *maximum, float *sum, float *own) {
  float *s = tile.row(i);
  const float scale = tile.scale;
#pragma omp simd
  for (int64_t j = 0; j < tile.columns; ++j) s[j] *= scale;
  if (tile.has_own(i)) {
    own[i] = s[i + tile.diagonal];
    s[i + tile.diagonal] = -__builtin_inff();
  }
  float largest = maximum[i];
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < tile.columns; ++j) largest = s[j] > largest ? s[j] : largest;
  const float shift = finite_shift(largest);
  float parts[PARTS] = {};
  int64_t j = 0;
  for (; j + PARTS <= tile.columns; j += PARTS) {
#pragma omp simd
    for (int64_t p = 0; p < PARTS; ++p) parts[p] += tl_expf(s[j + p] - shift);
  }
  for (int64_t p = 0; j + p < tile.columns; ++p) parts[p] += tl_expf(s[j + p] - shift);
  sum[i] = sum[i] * tl_expf(maximum[i] - shift) + sum_of(parts);
  maximum[i] = largest;
}

// The same for up to STRIP_COLUMNS columns of a tile whose rows are reduced.
static void reduce_columns(const Tile &tile, int64_t first, int64_t count, float *maximum, float *sum) {
  float largest[STRIP_COLUMNS], shift[STRIP_COLUMNS], added[STRIP_COLUMNS];
  std::memcpy(largest, maximum + first, sizeof(float) * static_cast<size_t>(count));
  for (int64_t i = 0; i < tile.rows; ++i) {
    const float *s = tile.row(i) + first;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) largest[j] = s[j] > largest[j] ? s[j] : largest[j];
  }
  for (int64_t j = 0; j < count; ++j) {
    shift[j] = finite_shift(largest[j]);
    added[j] = 0.0f;
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const float *s = tile.row(i) + first;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) added[j] += tl_expf(s[j] - shift[j]);
  }
  for (int64_t j = 0; j < count; ++j) {
    sum[first + j] = sum[first + j] * tl_expf(maximum[first + j] - shift[j]) + added[j];
    maximum[first + j] = largest[j];
  }
}

int tl_contrastive_softmax_forward_cpu(float *tile, float *row_maximum, float *row_sum, float *column_maximum,
                                       float *column_sum, float *own, int64_t rows, int64_t columns, int64_t stride,
                                       int64_t diagonal, double scale, int threads) {
  const Tile t{tile, rows, columns, stride, diagonal, static_cast<float>(scale)};
  for_each_strip(rows, STRIP_ROWS, threads, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) reduce_row(t, i, row_maximum, row_sum, own);
  });
  for_each_strip(columns, STRIP_COLUMNS, threads, [&](int64_t first, int64_t end) {
    if (end - first == STRIP_COLUMNS)
      reduce_columns(t, first, STRIP_COLUMNS, column_maximum, column_sum);
    else
      reduce_columns(t, first, end - first, column_maximum, column_sum);
  });
  return TL_OK;
}

int tl_contrastive_softmax_backward_cpu(float *tile, const float *row_lse, const float *row_weight,
                                        const float *column_lse, const float *column_weight, const float *own_weight,
                                        int64_t rows, int64_t columns, int64_t stride, int64_t diagonal, double scale,
                                        int threads) {
  const Tile t{tile, rows, columns, stride, diagonal, static_cast<float>(scale)};
  for_each_strip(rows, STRIP_ROWS, threads, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      float *s = t.row(i);
      const float lse = row_lse[i], weight = row_weight[i];
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) {
        const float score = t.scale * s[j];
        s[j] = weight * tl_expf(score - lse) + column_weight[j] * tl_expf(score - column_lse[j]);
      }
      if (t.has_own(i)) s[i + diagonal] = own_weight[i];
    }
  });
  return TL_OK;
}

// ---- sigmoid: sums over each row of softplus(s + bias) and of its derivative ----

int tl_contrastive_sigmoid_forward_cpu(float *tile, float *row_softplus, float *row_sigmoid, float *own, int64_t rows,
                                       int64_t columns, int64_t stride, int64_t diagonal, double scale, double bias,
                                       int threads) {
  const Tile t{tile, rows, columns, stride, diagonal, static_cast<float>(scale)};
  const float shift = static_cast<float>(bias);
  for_each_strip(rows, STRIP_ROWS, threads, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      float *s = t.row(i);
      float softplus[PARTS] = {}, sigmoid[PARTS] = {};
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) s[j] *= t.scale;
      if (t.has_own(i)) {
        own[i] = s[i + diagonal];
        s[i + diagonal] = -__builtin_inff();  // softplus and sigmoid of -inf are 0
      }
      const auto add = [&](float score, int64_t p) __attribute__((always_inline)) {
        const float x = score + shift, small = tl_expf(x < 0.0f ? x : -x);
        softplus[p] += (x > 0.0f ? x : 0.0f) + tl_log1pf(small);
        sigmoid[p] += (x < 0.0f ? small : 1.0f) / (1.0f + small);
      };
      int64_t j = 0;
      for (; j + PARTS <= columns; j += PARTS) {
#pragma omp simd
        for (int64_t p = 0; p < PARTS; ++p) add(s[j + p], p);
      }
      for (int64_t p = 0; j + p < columns; ++p) add(s[j + p], p);
      row_softplus[i] += sum_of(softplus);
      row_sigmoid[i] += sum_of(sigmoid);
    }
  });
  return TL_OK;
}

int tl_contrastive_sigmoid_backward_cpu(float *tile, const float *row_weight, const float *own_weight, int64_t rows,
                                        int64_t columns, int64_t stride, int64_t diagonal, double scale, double bias,
                                        int threads) {
  const Tile t{tile, rows, columns, stride, diagonal, static_cast<float>(scale)};
  const float shift = static_cast<float>(bias);
  for_each_strip(rows, STRIP_ROWS, threads, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      float *s = t.row(i);
      const float weight = row_weight[i];
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) {
        const float x = t.scale * s[j] + shift, small = tl_expf(x < 0.0f ? x : -x);
        s[j] = weight * (x < 0.0f ? small : 1.0f) / (1.0f + small);
      }
      if (t.has_own(i)) s[i + diagonal] = own_weight[i];
    }
  });
  return TL_OK;
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_contrastive_softmax_forward_cpu,
             (float *tile, float *row_maximum, float *row_sum, float *column_maximum, float *column_sum, float *own,
              int64_t rows, int64_t columns, int64_t stride, int64_t diagonal, double scale, int threads),
             (tile, row_maximum, row_sum, column_maximum, column_sum, own, rows, columns, stride, diagonal, scale,
              threads))
TL_CPU_ENTRY(tl_contrastive_softmax_backward_cpu,
             (float *tile, const float *row_lse, const float *row_weight, const float *column_lse,
              const float *column_weight, const float *own_weight, int64_t rows, int64_t columns, int64_t stride,
              int64_t diagonal, double scale, int threads),
             (tile, row_lse, row_weight, column_lse, column_weight, own_weight, rows, columns, stride, diagonal, scale,
              threads))
TL_CPU_ENTRY(tl_contrastive_sigmoid_forward_cpu,
             (float *tile, float *row_softplus, float *row_sigmoid, float *own, int64_t rows, int64_t columns,
              int64_t stride, int64_t diagonal, double scale, double bias, int threads),
             (tile, row_softplus, row_sigmoid, own, rows, columns, stride, diagonal, scale, bias, threads))
TL_CPU_ENTRY(tl_contrastive_sigmoid_backward_cpu,
             (float *tile, const float *row_weight, const float *own_weight, int64_t rows, int64_t columns,
              int64_t stride, int64_t diagonal, double scale, double bias, int threads),
             (tile, row_weight, own_weight, rows, columns, stride, diagonal, scale, bias, threads))
