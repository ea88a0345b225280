// Products of float32 matrices that training needs, on AMX: y = x w^T and c = g^T x. As in linear_fp32.cpp each number is
// split into three bfloat16 numbers, which hold all its bits, and of the nine products the six that reach float32's last
// bit are summed. Here nothing is kept between calls: w is split once a call, rows a strip at a time in the cache.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"
#include "matrix.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"
#include "tile.h"

namespace TL_ISA {

#if defined(__AMX_TILE__)

static constexpr int64_t PLANES = 3, PANEL = 2 * TILE_SIDE, STRIP = 2 * TILE_SIDE, STEP = Bf16::step;
static constexpr int64_t TASK_STRIPS = 4;        // strips of rows a task of y = x w^T takes
static constexpr int64_t CHUNK_STEPS = 4;        // steps of rows that are split at a time for c = g^T x
static constexpr int64_t MAX_PARTIAL_SUMS = 16;  // c is summed over at most so many parts of the rows, whatever the threads

static int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

static inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// 16 floats as the sum of three bfloat16 numbers, each in the upper half of its lane. The first two are rounded, half away
// from zero, the third is what is left and exact; infinity and NaN stay in the first.
static inline void split_lanes(__m512i (&planes)[PLANES], __m512 x) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __mmask16 finite = _mm512_fpclass_ps_mask(x, 0x99) ^ 0xffff;
  const __m512i bits = _mm512_castps_si512(x);
  planes[0] = _mm512_and_si512(_mm512_mask_add_epi32(bits, finite, bits, half), upper);
  const __m512 rest = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(planes[0]));
  planes[1] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  planes[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(planes[1])));
}

// Two vectors of floats as pairs of bfloat16 numbers of the same lane, one vector a plane.
static inline void split_two(uint8_t *const (&to)[PLANES], __m512 low, __m512 high) {
  __m512i lows[PLANES], highs[PLANES];
  split_lanes(lows, low);
  split_lanes(highs, high);
  for (int64_t p = 0; p < PLANES; ++p)
    _mm512_storeu_si512(to[p], _mm512_or_si512(highs[p], _mm512_srli_epi32(lows[p], 16)));
}

// A matrix operand of fp32 rows, and how much of it there is.
struct Matrix {
  const float *data;
  int64_t rows, columns, stride;
};

// Rows [first, first + 16) as left tiles [plane][step][1024], with zeros for what is missing. In a step column j stands
// beside column j + 16; so it does in both operands of y = x w^T.
static void split_left(uint8_t *tiles, int64_t plane_bytes, const Matrix &x, int64_t first) {
  for (int64_t i = 0; i < TILE_SIDE; ++i) {
    const bool there = first + i < x.rows;
    const float *row = x.data + (there ? first + i : 0) * x.stride;
    uint8_t *to = tiles + i * STEP_BYTES;
    for (int64_t k = 0; k < x.columns; k += STEP, to += TILE_BYTES) {
      const __mmask16 low = there ? first_lanes(x.columns - k) : 0, high = there ? first_lanes(x.columns - k - 16) : 0;
      split_two({to, to + plane_bytes, to + 2 * plane_bytes}, _mm512_maskz_loadu_ps(low, row + k),
                _mm512_maskz_loadu_ps(high, row + k + 16));
    }
  }
}

// Rows [first, first + 32), columns [column, column + 16) as one right tile a plane: [16 pairs of rows][16 columns][2].
static void split_pairs(uint8_t *const (&to)[PLANES], const Matrix &x, int64_t first, int64_t column) {
  const __mmask16 inside = first_lanes(x.columns - column);
  for (int64_t pair = 0; pair < 16; ++pair) {
    const int64_t row = first + 2 * pair, at = pair * STEP_BYTES;
    const float *from = x.data + row * x.stride + column;
    split_two({to[0] + at, to[1] + at, to[2] + at}, _mm512_maskz_loadu_ps(row < x.rows ? inside : 0, from),
              _mm512_maskz_loadu_ps(row + 1 < x.rows ? inside : 0, from + x.stride));
  }
}

// c [32][32] (row stride in floats) = or += left x right over the steps; c lies inside its matrix.
static inline void multiply_whole(float *c, int64_t stride, bool add, Tiles a, int64_t a_plane, Tiles b, int64_t b_plane,
                                  int64_t steps) {
  const int64_t bytes = stride * 4;
  float *lower = c + TILE_SIDE * stride;
  finish_writes();
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + TILE_SIDE, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + TILE_SIDE, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  add_split_products<2>(a, a_plane, b, b_plane, steps);
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + TILE_SIDE, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + TILE_SIDE, bytes);
}

// The same for a block at the edge, of which rows x columns are inside.
static inline void multiply_edge(float *c, int64_t stride, bool add, int64_t rows, int64_t columns, Tiles a,
                                 int64_t a_plane, Tiles b, int64_t b_plane, int64_t steps) {
  alignas(64) float sums[STRIP * PANEL];
  multiply_whole(sums, PANEL, false, a, a_plane, b, b_plane, steps);
  finish_writes();
  for (int64_t i = 0; i < std::min(rows, STRIP); ++i)
    for (int64_t j = 0; j < std::min(columns, PANEL); ++j)
      c[i * stride + j] = sums[i * PANEL + j] + (add ? c[i * stride + j] : 0.0f);
}

// w (outputs, inputs) as right tiles [panel][plane][step][2 tiles][1024]: left tiles of its rows, transposed.
static void split_weight(uint8_t *panels, const Matrix &w, int64_t panel, int64_t steps) {
  uint8_t *to = panels + panel * PLANES * steps * 2 * TILE_BYTES;
  const int64_t plane_bytes = steps * TILE_BYTES;
  uint8_t *left = kept_scratch<4>(PLANES * plane_bytes);
  for (int64_t side = 0; side < 2; ++side) {
    split_left(left, plane_bytes, w, panel * PANEL + side * TILE_SIDE);
    for (int64_t p = 0; p < PLANES; ++p)
      for (int64_t k = 0; k < steps; ++k) {
        uint8_t *tile = to + ((p * steps + k) * 2 + side) * TILE_BYTES;
        std::memcpy(tile, left + p * plane_bytes + k * TILE_BYTES, TILE_BYTES);
        transpose(reinterpret_cast<float *>(tile));
      }
  }
}

static int product(const Matrix &x, const Matrix &w, float *y, int64_t y_stride, bool accumulate, int threads) {
  const int64_t steps = parts(x.columns, STEP), panels = parts(w.rows, PANEL), strips = parts(x.rows, STRIP);
  const int64_t panel_bytes = PLANES * steps * 2 * TILE_BYTES, tile_plane = steps * TILE_BYTES;
  uint8_t *weight = kept_scratch<3>(panels * panel_bytes);
  if (weight == nullptr) return tl_fail(TL_OUT_OF_MEMORY, "product: no memory for %lld panels", (long long)panels);
  std::atomic<bool> failed{false};
  parallel_for(panels, threads, [&](int64_t panel) {
    if (kept_scratch<4>(2 * PLANES * tile_plane) == nullptr) return failed.store(true);
    split_weight(weight, w, panel, steps);
  });
  parallel_for(parts(strips, TASK_STRIPS), threads, [&](int64_t task) {
    uint8_t *rows = kept_scratch<4>(2 * PLANES * tile_plane);
    if (rows == nullptr || failed) return failed.store(true);
    const MatrixUnit unit;
    for (int64_t strip = task * TASK_STRIPS; strip < std::min(strips, (task + 1) * TASK_STRIPS); ++strip) {
      for (int64_t side = 0; side < 2; ++side)
        split_left(rows + side * PLANES * tile_plane, tile_plane, x, strip * STRIP + side * TILE_SIDE);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const Tiles a{rows, PLANES * tile_plane, TILE_BYTES};
        const Tiles b{weight + panel * panel_bytes, TILE_BYTES, 2 * TILE_BYTES};
        float *to = y + strip * STRIP * y_stride + panel * PANEL;
        const int64_t left_rows = x.rows - strip * STRIP, left_columns = w.rows - panel * PANEL, plane = 2 * tile_plane;
        if (left_rows >= STRIP && left_columns >= PANEL)
          multiply_whole(to, y_stride, accumulate, a, tile_plane, b, plane, steps);
        else
          multiply_edge(to, y_stride, accumulate, left_rows, left_columns, a, tile_plane, b, plane, steps);
      }
    }
  });
  return failed ? tl_fail(TL_OUT_OF_MEMORY, "product: no memory for a strip of rows") : TL_OK;
}

// Of rows [first, first + steps): g as left tiles [block of 32][2 tiles][plane][step], x as right tiles [panel][plane]
// [step][2 tiles]; sums (padded to blocks of 32) += g^T x.
static void add_chunk(float *sums, uint8_t *left, uint8_t *right, const Matrix &g, const Matrix &x, int64_t first,
                      int64_t steps) {
  const int64_t blocks = parts(g.columns, STRIP), panels = parts(x.columns, PANEL);
  const int64_t left_plane = steps * TILE_BYTES, right_plane = 2 * left_plane;
  for (int64_t tile = 0; tile < 2 * blocks; ++tile)
    for (int64_t k = 0; k < steps; ++k) {
      uint8_t *to[PLANES];
      for (int64_t p = 0; p < PLANES; ++p) to[p] = left + (tile * PLANES + p) * left_plane + k * TILE_BYTES;
      split_pairs({to[0], to[1], to[2]}, g, first + k * STEP, tile * TILE_SIDE);
      for (int64_t p = 0; p < PLANES; ++p) transpose(reinterpret_cast<float *>(to[p]));
    }
  for (int64_t tile = 0; tile < 2 * panels; ++tile)
    for (int64_t k = 0; k < steps; ++k) {
      uint8_t *to = right + tile / 2 * PLANES * right_plane + (2 * k + tile % 2) * TILE_BYTES;
      split_pairs({to, to + right_plane, to + 2 * right_plane}, x, first + k * STEP, tile * TILE_SIDE);
    }
  const MatrixUnit unit;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Tiles a{left + block * 2 * PLANES * left_plane, PLANES * left_plane, TILE_BYTES};
      const Tiles b{right + panel * PLANES * right_plane, TILE_BYTES, 2 * TILE_BYTES};
      float *to = sums + block * STRIP * panels * PANEL + panel * PANEL;
      multiply_whole(to, panels * PANEL, true, a, left_plane, b, right_plane, steps);
    }
}

static int transposed_product(const Matrix &g, const Matrix &x, float *c, int64_t c_stride, int threads) {
  const int64_t chunk_rows = CHUNK_STEPS * STEP, chunks = parts(g.rows, chunk_rows);
  const int64_t partials = std::min(chunks, MAX_PARTIAL_SUMS);
  const int64_t height = parts(g.columns, STRIP) * STRIP, width = parts(x.columns, PANEL) * PANEL;
  const int64_t left_bytes = height / TILE_SIDE * PLANES * CHUNK_STEPS * TILE_BYTES;
  const int64_t right_bytes = width / TILE_SIDE * PLANES * CHUNK_STEPS * TILE_BYTES;
  const int64_t size = height * width;
  float *sums = reinterpret_cast<float *>(kept_scratch<3>(sizeof(float) * partials * size));
  std::atomic<bool> failed{sums == nullptr};
  parallel_for(partials, threads, [&](int64_t partial) {
    uint8_t *tiles = kept_scratch<4>(left_bytes + right_bytes);
    if (tiles == nullptr || failed) return failed.store(true);
    float *mine = sums + partial * size;
    std::memset(mine, 0, sizeof(float) * size);
    for (int64_t chunk = partial * chunks / partials; chunk < (partial + 1) * chunks / partials; ++chunk) {
      const int64_t first = chunk * chunk_rows, left_rows = std::min(chunk_rows, g.rows - first);
      add_chunk(mine, tiles, tiles + left_bytes, g, x, first, parts(left_rows, STEP));
    }
  });
  if (failed) return tl_fail(TL_OUT_OF_MEMORY, "product: no memory for %lld partial sums", (long long)partials);
  parallel_for(parts(g.columns, 16), threads, [&](int64_t block) {
    for (int64_t i = block * 16; i < std::min(g.columns, block * 16 + 16); ++i) {
      float *to = c + i * c_stride;
      std::memset(to, 0, sizeof(float) * x.columns);
      for (int64_t partial = 0; partial < partials; ++partial) {
        const float *from = sums + partial * size + i * width;
#pragma omp simd
        for (int64_t j = 0; j < x.columns; ++j) to[j] += from[j];
      }
    }
  });
  return TL_OK;
}

#endif

int tl_product_fp32_cpu(const float *x, const float *w, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                        int64_t x_stride, int64_t w_stride, int64_t y_stride, int accumulate, int threads) {
#if defined(__AMX_TILE__)
  if (rows == 0 || outputs == 0) return TL_OK;
  return product({x, rows, inputs, x_stride}, {w, outputs, inputs, w_stride}, y, y_stride, accumulate != 0, threads);
#else
  return tl_fail(TL_BAD_ARGUMENT, "products in float32 run on AMX alone; use PyTorch's here");
#endif
}

int tl_transposed_product_fp32_cpu(const float *g, const float *x, float *c, int64_t rows, int64_t g_columns,
                                   int64_t x_columns, int64_t g_stride, int64_t x_stride, int64_t c_stride,
                                   int threads) {
#if defined(__AMX_TILE__)
  if (g_columns == 0 || x_columns == 0) return TL_OK;
  return transposed_product({g, rows, g_columns, g_stride}, {x, rows, x_columns, x_stride}, c, c_stride, threads);
#else
  return tl_fail(TL_BAD_ARGUMENT, "products in float32 run on AMX alone; use PyTorch's here");
#endif
}

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_product_fp32_cpu,
                (const float *x, const float *w, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                 int64_t x_stride, int64_t w_stride, int64_t y_stride, int accumulate, int threads),
                (x, w, y, rows, inputs, outputs, x_stride, w_stride, y_stride, accumulate, threads))
TL_MATRIX_ENTRY(tl_transposed_product_fp32_cpu,
                (const float *g, const float *x, float *c, int64_t rows, int64_t g_columns, int64_t x_columns,
                 int64_t g_stride, int64_t x_stride, int64_t c_stride, int threads),
                (g, x, c, rows, g_columns, x_columns, g_stride, x_stride, c_stride, threads))
