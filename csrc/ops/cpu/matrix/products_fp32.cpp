// Products of float32 matrices in training, y = x w^T, on AMX. As in linear_fp32.cpp each number is split into three
// bfloat16 numbers, which hold all its bits, and of the nine products the six that reach float32's last bit are summed.
// w is small and new in each call: all of it is split first, then rows of x a strip at a time, which stay in the cache.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "split.h"
#include "status.h"
#include "tile.h"

namespace TL_ISA {

#if defined(__AMX_TILE__)

static constexpr int64_t PANEL = 2 * TILE_SIDE, STRIP = 2 * TILE_SIDE, STEP = Bf16::step;
static constexpr int64_t TASK_STRIPS = 4;        // strips of rows a task of y = x w^T takes

static int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

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

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_product_fp32_cpu,
                (const float *x, const float *w, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                 int64_t x_stride, int64_t w_stride, int64_t y_stride, int accumulate, int threads),
                (x, w, y, rows, inputs, outputs, x_stride, w_stride, y_stride, accumulate, threads))
