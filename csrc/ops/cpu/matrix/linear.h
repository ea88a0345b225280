// A frozen linear layer on the CPU, y = activation(x W^T + bias): what its formats share.
//
// Two passes. The rows of x are laid out as left tiles once, which is where int8 quantises them and fp32 splits them.
// Then tasks take groups of W's panels (32 outputs each) that fit the L2 cache, unpack them where the format asks for it,
// and run all rows past them; bias, scales, activation and rounding happen on each 32 x 32 block while it is in L1.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "activation.h"
#include "dtype.h"
#include "inline.h"
#include "int8_scale.h"
#include "matrix.h"
#include "parallel.h"
#include "scratch.h"

namespace {

static constexpr int64_t PANEL = 2 * TILE_SIDE, STRIP = 2 * TILE_SIDE;
static constexpr int64_t GROUP_BYTES = 1 << 18;  // of panels that a task keeps in L2

static constexpr int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Layer {
  const void *x, *weight;
  const float *scale;            // int8 and nf4: one an output, padded to whole panels
  const uint8_t *group_scale;    // nf4: [panel][inputs / 64][PANEL]
  const float *smooth, *bias;
  void *y;
  int64_t rows, inputs, outputs, x_stride, y_stride;
  int x_dtype, y_dtype, activation;
  bool gated;
  int threads;
  bool x_in_tiles = false, y_in_tiles = false;  // left tiles of whole steps of bfloat16 instead of rows

  int64_t panels() const { return parts(outputs, PANEL); }
  int64_t row_tiles() const { return parts(rows, TILE_SIDE); }
};

// ---- rows of x as left tiles ----

struct Left {
  uint8_t *tiles;     // [plane][row_tile][step][1024]
  float *scale;       // int8: one a row
  int32_t *sums;      // int8: of each row
  int64_t steps, plane_bytes;

  uint8_t *tile(int64_t row_tile, int64_t step, int64_t plane = 0) const {
    return tiles + plane * plane_bytes + (row_tile * steps + step) * TILE_BYTES;
  }
};

template <class X>
static inline void read_row(float *to, const X *x, const float *smooth, int64_t count, int64_t padded) {
  if (smooth == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = tl_load(x[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = tl_load(x[j]) * smooth[j];
  }
  for (int64_t j = count; j < padded; ++j) to[j] = 0.0f;
}

static inline void round_row(const float *row, const Left &left, int64_t i) {
  for (int64_t step = 0; step < left.steps; ++step) {
    auto *to = reinterpret_cast<tl_bf16 *>(left.tile(i / TILE_SIDE, step) + i % TILE_SIDE * STEP_BYTES);
    round_step(to, row + step * Bf16::step);
  }
}

#if defined(__AMX_TILE__)
static inline void split_row(const float *row, const Left &left, int64_t i) {
  const int64_t at = i % TILE_SIDE * STEP_BYTES;
  for (int64_t step = 0; step < left.steps; ++step) {
    tl_bf16 *planes[3];
    for (int64_t p = 0; p < 3; ++p) planes[p] = reinterpret_cast<tl_bf16 *>(left.tile(i / TILE_SIDE, step, p) + at);
    split_step(planes, row + step * Bf16::step);
  }
}
#endif

// 64 numbers times `inverse` in int8; returns their sum.
static inline int32_t quantise_step(int8_t *to, const float *from, float inverse) {
#if defined(__AVX512F__)
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int64_t j = 0; j < Int8::step; j += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(from + j), _mm512_set1_ps(inverse));
    const __m512i values = _mm512_cvtps_epi32(_mm512_min_ps(scaled, _mm512_set1_ps(INT8_LARGEST)));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + j), _mm512_cvtepi32_epi8(values));
    sum = _mm512_add_epi32(sum, values);
  }
  return _mm512_reduce_add_epi32(sum);
#else
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < Int8::step; ++j) {
    const float scaled = from[j] * inverse, bounded = scaled < INT8_LARGEST ? scaled : INT8_LARGEST;
    const int32_t value = static_cast<int32_t>(tl_float_bits(bounded + ROUNDER) - tl_float_bits(ROUNDER));
    to[j] = static_cast<int8_t>(value);
    sum += value;
  }
  return sum;
#endif
}

// As quantise_rows does it; a row that holds NaN or infinity has NaN for its scale.
static inline void quantise_row(const float *row, const Left &left, int64_t i) {
  float largest = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t j = 0; j < left.steps * Int8::step; ++j) {
    const float size = std::fabs(row[j]);
    largest = size > largest ? size : largest;
    poison += row[j] * 0.0f;
  }
  const RowScale scale = int8_scale(largest + poison);
  left.scale[i] = scale.scale + poison;
  int32_t sum = 0;
  for (int64_t step = 0; step < left.steps; ++step) {
    auto *to = reinterpret_cast<int8_t *>(left.tile(i / TILE_SIDE, step) + i % TILE_SIDE * STEP_BYTES);
    if (scale.inverse == 0.0f)
      std::memset(to, 0, STEP_BYTES);
    else
      sum += quantise_step(to, row + step * Int8::step, scale.inverse);
  }
  left.sums[i] = sum;
}

enum class Rows { Rounded, Quantised, Split };

template <Rows Kind, class X>
static bool lay_out_rows(const Layer &layer, const Left &left, int64_t row_tile) {
  constexpr int64_t step = Kind == Rows::Quantised ? Int8::step : Bf16::step;
  const int64_t padded = left.steps * step, first = row_tile * TILE_SIDE;
  auto *row = reinterpret_cast<float *>(kept_scratch<1>(4 * padded));
  if (row == nullptr) return false;
  for (int64_t i = first; i < first + TILE_SIDE; ++i) {
    const bool real = i < layer.rows;
    const X *x = static_cast<const X *>(layer.x) + (real ? i : 0) * layer.x_stride;
    if constexpr (Kind == Rows::Rounded && std::is_same_v<X, tl_bf16>) {
      if (real && layer.smooth == nullptr && layer.inputs == padded) {
        for (int64_t k = 0; k < left.steps; ++k)
          std::memcpy(left.tile(row_tile, k) + (i - first) * STEP_BYTES, x + k * step, STEP_BYTES);
        continue;
      }
    }
    read_row(row, x, layer.smooth, real ? layer.inputs : 0, padded);
    if constexpr (Kind == Rows::Rounded) round_row(row, left, i);
    if constexpr (Kind == Rows::Quantised) quantise_row(row, left, i);
#if defined(__AMX_TILE__)
    if constexpr (Kind == Rows::Split) split_row(row, left, i);
#endif
  }
  return true;
}

// ---- what is done to a block of sums ----

template <int Activation, class Y>
TL_INLINED float activate(float x) {
  if constexpr (Activation == TL_GELU && std::is_same_v<Y, tl_bf16>) return tl_gelu_for_bf16(x);
  return tl_activate<Activation>(x);
}

static constexpr float NO_BIAS[PANEL] = {};

// What sums are multiplied by: those of int8 products are whole numbers.
enum class Scales { None, OfOutputs, OfRowsAndOutputs };

// The rows of one block of sums, [STRIP][PANEL], on their way to y. What is done to them is chosen once a layer: the loops
// over tiles do not depend on it.
struct Finish {
  const void *sums = nullptr;
  const float *bias = nullptr, *scale = nullptr, *row_scale = nullptr;
  void *y = nullptr;
  int64_t y_stride = 0, tile_jump = 0, count = 0, rows = 0, next = 0;
  bool gated = false;

  static constexpr int64_t ROWS_AT_ONCE = 4;

  // Where row i goes; tiles of 16 rows are tile_jump apart from end to begin.
  int64_t at(int64_t i) const { return i * y_stride + i / TILE_SIDE * tile_jump; }
};
typedef void (*FinishRows)(Finish &);  // the next ROWS_AT_ONCE rows, as many of them as there are

static inline Finish finish_block(const Layer &layer, const Left &left, const void *sums, int64_t first, int64_t panel,
                                  Scales scales) {
  const int64_t width = layer.gated ? PANEL / 2 : PANEL, outputs = layer.gated ? layer.outputs / 2 : layer.outputs;
  const int64_t number = layer.y_dtype == TL_F32 ? 4 : 2;
  Finish block;
  block.sums = sums;
  block.bias = layer.bias == nullptr ? NO_BIAS : layer.bias + panel * PANEL;
  if (scales != Scales::None) block.scale = layer.scale + panel * PANEL;
  if (scales == Scales::OfRowsAndOutputs) block.row_scale = left.scale + first;
  block.y_stride = layer.y_stride;
  int64_t begin = first * layer.y_stride + panel * width;
  if (layer.y_in_tiles) {
    const int64_t steps = outputs / Bf16::step, column = panel * width;
    block.y_stride = Bf16::step, block.tile_jump = (steps - 1) * TILE_SIDE * Bf16::step;
    begin = (first * steps + column / Bf16::step * TILE_SIDE) * Bf16::step + column % Bf16::step;
  }
  block.y = static_cast<uint8_t *>(layer.y) + begin * number;
  block.count = std::min(width, outputs - panel * width);
  block.rows = block.count <= 0 ? 0 : std::min(STRIP, layer.rows - first);
  block.gated = layer.gated;
  for (int64_t i = 0; i < block.rows; ++i)
    __builtin_prefetch(static_cast<uint8_t *>(block.y) + block.at(i) * number, 1, 3);
  return block;
}

template <Scales Kind>
TL_INLINED void read_sums(float *row, const Finish &block, int64_t i) {
  using Sum = std::conditional_t<Kind == Scales::OfRowsAndOutputs, int32_t, float>;
  const Sum *sums = static_cast<const Sum *>(block.sums) + i * PANEL;
  const float *bias = block.bias, *scale = block.scale;
  if constexpr (Kind == Scales::OfRowsAndOutputs) {
    const float row_scale = block.row_scale[i];
#pragma omp simd
    for (int64_t j = 0; j < PANEL; ++j) row[j] = static_cast<float>(sums[j]) * (row_scale * scale[j]) + bias[j];
  } else if constexpr (Kind == Scales::OfOutputs) {
#pragma omp simd
    for (int64_t j = 0; j < PANEL; ++j) row[j] = sums[j] * scale[j] + bias[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < PANEL; ++j) row[j] = sums[j] + bias[j];
  }
}

template <int Activation, class Y, Scales Kind>
static void finish_rows(Finish &block) {
  const int64_t end = std::min(block.next + Finish::ROWS_AT_ONCE, block.rows);
  // two loops: each keeps what it needs in registers, and no more
  if (!block.gated)
    for (; block.next < end; ++block.next) {
      float row[PANEL];
      read_sums<Kind>(row, block, block.next);
#pragma omp simd
      for (int64_t j = 0; j < PANEL; ++j) row[j] = activate<Activation, Y>(row[j]);
      Y *y = static_cast<Y *>(block.y) + block.at(block.next);
      if (block.count == PANEL)
        store_step(y, row);
      else
        for (int64_t j = 0; j < block.count; ++j) tl_store(&y[j], row[j]);
    }
  else  // the panel's first half are gates, its second what they gate
    for (; block.next < end; ++block.next) {
      float row[PANEL];
      read_sums<Kind>(row, block, block.next);
#pragma omp simd
      for (int64_t j = 0; j < TILE_SIDE; ++j) row[j] = activate<Activation, Y>(row[j]) * row[TILE_SIDE + j];
      Y *y = static_cast<Y *>(block.y) + block.at(block.next);
      for (int64_t j = 0; j < block.count; ++j) tl_store(&y[j], row[j]);
    }
}

static inline void finish_all(Finish &block, FinishRows finish) {
  while (block.next < block.rows) finish(block);
}

template <class Y, Scales Kind>
static FinishRows finish_of(int activation) {
  switch (activation) {
    case TL_NO_ACTIVATION:
      return finish_rows<TL_NO_ACTIVATION, Y, Kind>;
    case TL_GELU:
      return finish_rows<TL_GELU, Y, Kind>;
    case TL_GELU_TANH:
      return finish_rows<TL_GELU_TANH, Y, Kind>;
    case TL_QUICK_GELU:
      return finish_rows<TL_QUICK_GELU, Y, Kind>;
    case TL_RELU:
      return finish_rows<TL_RELU, Y, Kind>;
    case TL_SILU:
      return finish_rows<TL_SILU, Y, Kind>;
    default:
      tl_fail(TL_BAD_ARGUMENT, "unknown activation code %d", activation);
      return nullptr;
  }
}

// How a layer's panels are dealt out: groups that fit the cache, and enough of them for all threads.
struct Deal {
  int64_t group_panels, groups, row_chunks, chunk_strips;

  Deal(const Layer &layer, int64_t panel_bytes) {
    const int64_t panels = layer.panels(), strips = parts(layer.rows, STRIP);
    const int64_t fitting = std::max<int64_t>(1, GROUP_BYTES / panel_bytes);
    const int64_t wanted = parts(parts(panels, fitting), layer.threads) * layer.threads;
    group_panels = parts(panels, std::min(wanted, panels));
    groups = parts(panels, group_panels);
    row_chunks = std::min(strips, std::max<int64_t>(1, layer.threads / groups));
    chunk_strips = parts(strips, row_chunks);
    row_chunks = parts(strips, chunk_strips);
  }
};

template <class Body>
static int with_layer_dtype(int dtype, Body body) {
  if (dtype == TL_F32) return body(float{});
  if (dtype == TL_BF16) return body(tl_bf16{});
  return tl_fail(TL_BAD_ARGUMENT, "linear: dtype code %d is neither float32 nor bfloat16", dtype);
}

// Lays out the rows of x on all threads; body(left) then multiplies them.
template <Rows Kind, class Body>
static int with_rows(const Layer &layer, Body body) {
  const int64_t step = Kind == Rows::Quantised ? Int8::step : Bf16::step, planes = Kind == Rows::Split ? 3 : 1;
  const int64_t steps = parts(layer.inputs, step), plane_bytes = layer.row_tiles() * steps * TILE_BYTES;
  const int64_t padded_rows = layer.row_tiles() * TILE_SIDE;
  if (layer.x_in_tiles) {
    auto *given = static_cast<uint8_t *>(const_cast<void *>(layer.x));
    return body(Left{given, nullptr, nullptr, steps, plane_bytes});
  }
  uint8_t *tiles = kept_scratch<0>(planes * plane_bytes + 8 * padded_rows);
  if (tiles == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "linear: no memory for %lld rows of %lld numbers", (long long)layer.rows,
                   (long long)layer.inputs);
  auto *scale = reinterpret_cast<float *>(tiles + planes * plane_bytes);
  auto *sums = reinterpret_cast<int32_t *>(scale + padded_rows);
  const Left left{tiles, scale, Kind == Rows::Quantised ? sums : nullptr, steps, plane_bytes};
  const int status = with_layer_dtype(layer.x_dtype, [&](auto x) {
    std::atomic<bool> failed{false};
    parallel_for(layer.row_tiles(), layer.threads, [&](int64_t tile) {
      if (!lay_out_rows<Kind, decltype(x)>(layer, left, tile)) failed = true;
    });
    return failed ? tl_fail(TL_OUT_OF_MEMORY, "linear: no memory for a row of x") : static_cast<int>(TL_OK);
  });
  return status == TL_OK ? body(left) : status;
}

}  // namespace
