// The products of side_products.h with operands rounded to bfloat16, to nearest even and once each, and sums in float32.
#pragma once

#include "side_products.h"

namespace {

#if defined(__AVX512BF16__)

// Operands in one plane of the tiles of matrix.h, for AMX and for AVX-512's products of pairs: left ones [tile of 16 rows]
// [step][1024], right ones [panel of 32 columns][step][2 tiles][1024].
struct RoundedProducts {
  struct Operand {
    const uint8_t *tiles;
    int64_t blocks, steps;
  };
  const MatrixUnit unit{};

  static int64_t bytes(int64_t rows, int64_t columns) { return 2 * padded(rows) * padded(columns); }

  static Operand rows(const Matrix &x, uint8_t *to) {
    const int64_t steps = padded(x.columns) / Bf16::step, blocks = padded(x.rows) / BLOCK;
    for (int64_t tile = 0; tile < 2 * blocks; ++tile)
      for (int64_t k = 0; k < steps; ++k) round_left(to + (tile * steps + k) * TILE_BYTES, x, tile * TILE_SIDE, k);
    return {to, blocks, steps};
  }

  static Operand transposed_weight(const Matrix &w, uint8_t *to) {
    const int64_t steps = padded(w.columns) / Bf16::step, panels = padded(w.rows) / BLOCK;
    for (int64_t tile = 0; tile < 2 * panels; ++tile)
      for (int64_t k = 0; k < steps; ++k) {
        uint8_t *turned = right_tile(to, steps, tile, k);
        round_left(turned, w, tile * TILE_SIDE, k);
        transpose(reinterpret_cast<float *>(turned));
      }
    return {to, panels, steps};
  }

  static Operand weight(const Matrix &w, uint8_t *to) {
    const int64_t steps = padded(w.rows) / Bf16::step, panels = padded(w.columns) / BLOCK;
    for (int64_t tile = 0; tile < 2 * panels; ++tile)
      for (int64_t k = 0; k < steps; ++k) round_right(right_tile(to, steps, tile, k), w, k, tile * TILE_SIDE);
    return {to, panels, steps};
  }

  static Operand wide(const Matrix &x, uint8_t *to) { return weight(x, to); }
  static Operand columns(const Matrix &x, uint8_t *to) {
    const int64_t steps = padded(x.rows) / Bf16::step, blocks = padded(x.columns) / BLOCK;
    for (int64_t tile = 0; tile < 2 * blocks; ++tile)
      for (int64_t k = 0; k < steps; ++k) {
        uint8_t *turned = to + (tile * steps + k) * TILE_BYTES;
        round_right(turned, x, k, tile * TILE_SIDE);
        transpose(reinterpret_cast<float *>(turned));
      }
    return {to, blocks, steps};
  }

  void multiply(float *c, int64_t stride, bool add, const Operand &left, const Operand &right) const {
    const int64_t tile = left.steps * TILE_BYTES, panel = 2 * tile;
    for (int64_t j = 0; j < right.blocks; ++j)
      for (int64_t i = 0; i < left.blocks; ++i)
        multiply_block(c + i * BLOCK * stride + j * BLOCK, stride, add, {left.tiles + i * 2 * tile, tile, TILE_BYTES},
                       {right.tiles + j * panel, TILE_BYTES, 2 * TILE_BYTES}, left.steps);
  }

 private:
  static uint8_t *right_tile(uint8_t *to, int64_t steps, int64_t tile, int64_t k) {
    return to + ((tile / 2 * steps + k) * 2 + tile % 2) * TILE_BYTES;
  }

  static void round_left(uint8_t *tile, const Matrix &x, int64_t row, int64_t k) {
    const __mmask16 low = first_lanes(x.columns - k * Bf16::step), high = first_lanes(x.columns - k * Bf16::step - 16);
    const float *from = x.data + row * x.stride + k * Bf16::step;
    for (int64_t i = 0; i < TILE_SIDE; ++i, tile += STEP_BYTES, from += x.stride) {
      const bool there = row + i < x.rows;
      _mm512_storeu_si512(tile, (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(there ? high : 0, from + 16),
                                                             _mm512_maskz_loadu_ps(there ? low : 0, from)));
    }
  }

  // Two rows are the pairs of a group.
  static void round_right(uint8_t *tile, const Matrix &w, int64_t k, int64_t column) {
    alignas(64) static constexpr uint16_t pairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(pairs);
    const __mmask16 there = first_lanes(w.columns - column);
    const float *from = w.data + k * Bf16::step * w.stride + column;
    for (int64_t row = k * Bf16::step; row < (k + 1) * Bf16::step; row += 2, from += 2 * w.stride, tile += STEP_BYTES) {
      const __m512 even = _mm512_maskz_loadu_ps(row < w.rows ? there : 0, from);
      const __m512 odd = _mm512_maskz_loadu_ps(row + 1 < w.rows ? there : 0, from + w.stride);
      _mm512_storeu_si512(tile, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
  }

#if defined(__AMX_TILE__)
  static void multiply_block(float *c, int64_t stride, bool add, Tiles left, Tiles right, int64_t steps) {
    load_sums(c, stride, add);
    for (int64_t k = 0; k < steps; ++k)
      add_tile_products<2, true, true>(left.first + k * left.step_stride, left.tile_stride,
                                       right.first + k * right.step_stride);
    store_sums(c, stride);
  }
#else
  static void multiply_block(float *c, int64_t stride, bool add, Tiles left, Tiles right, int64_t steps) {
    alignas(64) float sums[BLOCK * BLOCK];
    multiply_tiles<Bf16, 2, 2>(sums, left, right, steps, nullptr);
    for (int64_t i = 0; i < BLOCK; ++i)
      for (int64_t j = 0; j < BLOCK; j += LANES) {
        const Vector sum = load(sums + i * BLOCK + j);
        store(c + i * stride + j, add ? load(c + i * stride + j) + sum : sum);
      }
  }
#endif
};

#else

// Without products in bfloat16 operands are rounded, and multiplied in float32.
struct RoundedProducts : SplitProducts {
  static Operand rows(const Matrix &x, uint8_t *to) { return SplitProducts::rows(rounded(x, to), nullptr); }
  static Operand columns(const Matrix &x, uint8_t *to) { return SplitProducts::columns(rounded(x, to), nullptr); }
  static Operand wide(const Matrix &x, uint8_t *to) { return SplitProducts::wide(rounded(x, to), nullptr); }

  static Operand transposed_weight(const Matrix &w, uint8_t *to) {
    return rounded(SplitProducts::transposed_weight(w, to), to);
  }
  static Operand weight(const Matrix &w, uint8_t *to) { return rounded(SplitProducts::weight(w, to), to); }

 private:
  static float rounded(float x) {
    tl_bf16 nearest;
    tl_store(&nearest, x);
    return tl_load(nearest);
  }
  static Matrix rounded(const Matrix &x, uint8_t *to) {
    auto *rows = reinterpret_cast<float *>(to);
    const int64_t stride = padded(x.columns);
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t j = 0; j < x.columns; ++j) rows[i * stride + j] = rounded(x.data[i * x.stride + j]);
    return {rows, x.rows, x.columns, stride};
  }
  static Operand rounded(const Operand &panels, uint8_t *to) {
    auto *numbers = reinterpret_cast<float *>(to);
    for (int64_t i = 0; i < panels.rows * panels.depth; ++i) numbers[i] = rounded(numbers[i]);
    return panels;
  }
};

#endif

}  // namespace
