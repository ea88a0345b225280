// Products of a side network in float32: a strip of rows by a small weight, and the products of two strips that are a
// weight's gradient. Every result has whole blocks of 32 columns, zeros where an operand has none.
//
// On AMX operands are split into three planes of bfloat16 (split.h), once each; elsewhere they stay what they are.
#pragma once

#include <algorithm>
#include <cstring>

#include "split.h"
#include "tile.h"

namespace {

constexpr int64_t STRIP_ROWS = 64, BLOCK = 32;

static inline int64_t padded(int64_t count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

#if defined(__AMX_TILE__)

struct SplitProducts {
  // Left tiles [tile of 16 rows][plane][step][1024] or right ones [panel of 32 columns][plane][step][2 tiles][1024].
  struct Operand {
    const uint8_t *tiles;
    int64_t blocks, steps;
  };
  const MatrixUnit unit{};

  // Room for an operand of a matrix, whichever of the four it becomes.
  static int64_t bytes(int64_t rows, int64_t columns) { return PLANES * 2 * padded(rows) * padded(columns); }

  // x as it stands left of a weight.
  static Operand rows(const Matrix &x, uint8_t *to) {
    const int64_t steps = padded(x.columns) / Bf16::step, blocks = padded(x.rows) / BLOCK, plane = steps * TILE_BYTES;
    for (int64_t tile = 0; tile < 2 * blocks; ++tile)
      split_left(to + tile * PLANES * plane, plane, x, tile * TILE_SIDE);
    return {to, blocks, steps};
  }

  // w as y = x w^T takes it: left tiles of its rows, transposed.
  static Operand transposed_weight(const Matrix &w, uint8_t *to) {
    const int64_t steps = padded(w.columns) / Bf16::step, panels = padded(w.rows) / BLOCK, plane = steps * TILE_BYTES;
    alignas(64) uint8_t planes[PLANES][TILE_BYTES];
    for (int64_t tile = 0; tile < 2 * panels; ++tile)
      for (int64_t k = 0; k < steps; ++k) {
        const Matrix step{w.data + k * Bf16::step, w.rows, std::min<int64_t>(w.columns - k * Bf16::step, Bf16::step),
                          w.stride};
        split_left(planes[0], TILE_BYTES, step, tile * TILE_SIDE);
        for (int64_t p = 0; p < PLANES; ++p) {
          transpose(reinterpret_cast<float *>(planes[p]));
          std::memcpy(to + tile / 2 * PLANES * 2 * plane + ((p * steps + k) * 2 + tile % 2) * TILE_BYTES, planes[p],
                      TILE_BYTES);
        }
      }
    return {to, panels, steps};
  }

  // w as y = x w takes it: rows j and j + 16 of a step side by side.
  static Operand weight(const Matrix &w, uint8_t *to) {
    const int64_t steps = padded(w.rows) / Bf16::step, panels = padded(w.columns) / BLOCK, plane = steps * 2 * TILE_BYTES;
    for (int64_t column = 0; column < panels * BLOCK; column += TILE_SIDE)
      for (int64_t k = 0; k < steps; ++k)
        split_right(to + column / BLOCK * PLANES * plane + (k * 2 + column / TILE_SIDE % 2) * TILE_BYTES, plane, w,
                    k * Bf16::step, column);
    return {to, panels, steps};
  }

  // The right one of two strips; and the left one, transposed.
  static Operand wide(const Matrix &x, uint8_t *to) { return weight(x, to); }
  static Operand columns(const Matrix &x, uint8_t *to) {
    const int64_t steps = padded(x.rows) / Bf16::step, blocks = padded(x.columns) / BLOCK, plane = steps * TILE_BYTES;
    for (int64_t tile = 0; tile < 2 * blocks; ++tile)
      for (int64_t k = 0; k < steps; ++k) {
        uint8_t *first = to + tile * PLANES * plane + k * TILE_BYTES;
        split_right(first, plane, x, k * Bf16::step, tile * TILE_SIDE);
        for (int64_t p = 0; p < PLANES; ++p) transpose(reinterpret_cast<float *>(first + p * plane));
      }
    return {to, blocks, steps};
  }

  // c = or += left right, whole blocks of 32 x 32.
  void multiply(float *c, int64_t stride, bool add, const Operand &left, const Operand &right) const {
    const int64_t tile = PLANES * left.steps * TILE_BYTES, panel = 2 * tile;
    for (int64_t j = 0; j < right.blocks; ++j)
      for (int64_t i = 0; i < left.blocks; ++i)
        multiply_whole(c + i * BLOCK * stride + j * BLOCK, stride, add, {left.tiles + i * 2 * tile, tile, TILE_BYTES},
                       left.steps * TILE_BYTES, {right.tiles + j * panel, TILE_BYTES, 2 * TILE_BYTES},
                       left.steps * 2 * TILE_BYTES, left.steps);
  }

 private:
  static void split_right(uint8_t *tile, int64_t plane, const Matrix &w, int64_t row, int64_t column) {
    const __mmask16 there = first_lanes(w.columns - column);
    const float *from = w.data + row * w.stride + column;
    for (int64_t g = 0; g < TILE_SIDE; ++g, tile += STEP_BYTES, from += w.stride) {
      const __mmask16 low = row + g < w.rows ? there : 0, high = row + g + 16 < w.rows ? there : 0;
      split_two({tile, tile + plane, tile + 2 * plane}, _mm512_maskz_loadu_ps(low, from),
                _mm512_maskz_loadu_ps(high, from + 16 * w.stride));
    }
  }
};

#else

struct SplitProducts {
  // A left operand: number (i, k) at data[i * row + k * column], rows x depth; a right one: panels [panel][depth][32], or,
  // of a strip, its rows as they are.
  struct Operand {
    const float *data;
    int64_t rows, depth, row, column;
  };

  static int64_t bytes(int64_t rows, int64_t columns) { return 4 * padded(rows) * padded(columns); }

  static Operand rows(const Matrix &x, uint8_t *) { return {x.data, x.rows, x.columns, x.stride, 1}; }
  static Operand wide(const Matrix &x, uint8_t *to) {
    const int64_t columns = padded(x.columns);
    if (x.stride >= columns) return {x.data, columns, x.rows, BLOCK, x.stride};
    auto *rows = reinterpret_cast<float *>(to);
    for (int64_t i = 0; i < x.rows; ++i) std::memcpy(rows + i * columns, x.data + i * x.stride, 4 * x.columns);
    return {rows, columns, x.rows, BLOCK, columns};
  }
  static Operand columns(const Matrix &x, uint8_t *) { return {x.data, x.columns, x.rows, 1, x.stride}; }

  static Operand transposed_weight(const Matrix &w, uint8_t *to) {
    auto *panels = reinterpret_cast<float *>(to);
    for (int64_t n = 0; n < padded(w.rows); ++n)
      for (int64_t k = 0; k < w.columns; ++k)
        panels[n / BLOCK * BLOCK * w.columns + k * BLOCK + n % BLOCK] = n < w.rows ? w.data[n * w.stride + k] : 0.0f;
    return {panels, padded(w.rows), w.columns, BLOCK * w.columns, BLOCK};
  }

  static Operand weight(const Matrix &w, uint8_t *to) {
    auto *panels = reinterpret_cast<float *>(to);
    for (int64_t n = 0; n < padded(w.columns); ++n)
      for (int64_t k = 0; k < w.rows; ++k)
        panels[n / BLOCK * BLOCK * w.rows + k * BLOCK + n % BLOCK] = n < w.columns ? w.data[k * w.stride + n] : 0.0f;
    return {panels, padded(w.columns), w.rows, BLOCK * w.rows, BLOCK};
  }

  void multiply(float *c, int64_t stride, bool add, const Operand &left, const Operand &right) const {
    for (int64_t j = 0; j < right.rows; j += BLOCK)
      for (int64_t i = 0; i < left.rows; i += ROWS_AT_ONCE)
        multiply_rows(c + i * stride + j, stride, add, left, i, right.data + j / BLOCK * right.row, right.column);
  }

 private:
  static constexpr int64_t VECTORS = BLOCK / LANES, ROWS_AT_ONCE = LANES == 16 ? 8 : LANES == 8 ? 2 : 1;

  static void multiply_rows(float *c, int64_t stride, bool add, const Operand &left, int64_t first, const float *right,
                            int64_t right_stride) {
    const float *x[ROWS_AT_ONCE];
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r)  // rows that are not there give sums that nothing reads
      x[r] = left.data + std::min(first + r, left.rows - 1) * left.row;
    Vector sums[ROWS_AT_ONCE][VECTORS] = {};
    for (int64_t k = 0; k < left.depth; ++k) {
      Vector w[VECTORS];
      for (int64_t v = 0; v < VECTORS; ++v) w[v] = load(right + k * right_stride + v * LANES);
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
        const Vector number = splat(x[r][k * left.column]);
        for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] += number * w[v];
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r)
      for (int64_t v = 0; v < VECTORS && first + r < left.rows; ++v) {
        float *to = c + r * stride + v * LANES;
        store(to, add ? load(to) + sums[r][v] : sums[r][v]);
      }
  }
};

#endif

}  // namespace
