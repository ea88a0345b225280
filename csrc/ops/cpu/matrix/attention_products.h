// The two products of packed attention for a strip of queries, in fp32 and in bfloat16 tiles.
//
// A strip's queries lie along the vector lanes: scores are [key][STRIP], sums of values [channel][STRIP]. Softmax then
// needs no sum across lanes, keys enter as they lie in memory, and exponentials become an operand without a transpose.
#pragma once

#include "dtype.h"
#include "tile.h"

#if defined(__AVX512BF16__)
#include "matrix.h"
#endif

namespace {

constexpr int64_t STRIP = 32;        // queries
constexpr int64_t PANEL = 256;       // keys whose scores are in memory at a time: 32 KiB
constexpr int64_t KEY_MULTIPLE = 32;  // packed keys are padded to this, and strips begin at a multiple of it

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// (tokens, heads, head_dim), the last dimension contiguous; cosines and sines (tokens, head_dim) or null.
struct Heads {
  const void *data;
  int64_t row, head, head_dim;
  const float *cosines, *sines;

  template <class T>
  const T *at(int64_t token, int64_t h) const {
    return static_cast<const T *>(data) + token * row + h * head;
  }
};

// One head of one token in fp32, rotated where there is a rotation: each first half against its second.
template <class T>
void read_head(float *to, const Heads &heads, int64_t token, int64_t h) {
  const T *from = heads.at<T>(token, h);
  for (int64_t d = 0; d < heads.head_dim; d += 64 / sizeof(T)) __builtin_prefetch(from + heads.head + d);
  if (heads.cosines == nullptr) {
    for (int64_t d = 0; d < heads.head_dim; ++d) to[d] = tl_load(from[d]);
    return;
  }
  const int64_t half = heads.head_dim / 2;
  const float *cosines = heads.cosines + token * heads.head_dim, *sines = heads.sines + token * heads.head_dim;
  for (int64_t d = 0; d < half; ++d) {
    const float first = tl_load(from[d]), second = tl_load(from[d + half]);
    to[d] = first * cosines[d] - second * sines[d];
    to[d + half] = second * cosines[d + half] + first * sines[d + half];
  }
}

// The first `count` lanes, or all, in the type of the output.
template <class T>
void write_lanes(T *to, Vector x, int64_t count) {
  alignas(64) float numbers[LANES];
  store(numbers, x);
  for (int64_t i = 0; i < smaller(count, LANES); ++i) tl_store(&to[i], numbers[i]);
}

#if defined(__AVX512BF16__)
inline void write_lanes(tl_bf16 *to, Vector x, int64_t count) {
  const __mmask16 present = static_cast<__mmask16>((1u << smaller(count, 16)) - 1);
  _mm256_mask_storeu_epi16(to, present, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// to[row][STRIP] = sum over steps of x[step][STRIP] * y[row * row_stride + step * step_stride]; rows a multiple of 8.
inline void multiply_strip(float *to, const float *x, const float *y, int64_t rows, int64_t row_stride, int64_t steps,
                           int64_t step_stride) {
  constexpr int ROWS = LANES == 16 ? 8 : 4;  // sums that fit the registers
  for (int64_t row = 0; row < rows; row += ROWS)
    for (int64_t lane = 0; lane < STRIP; lane += 2 * LANES) {
      Vector sum[ROWS][2] = {};
      for (int64_t step = 0; step < steps; ++step) {
        const float *numbers = y + row * row_stride + step * step_stride;
        const Vector low = load(x + step * STRIP + lane), high = load(x + step * STRIP + lane + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          sum[r][0] += low * numbers[r * row_stride];
          sum[r][1] += high * numbers[r * row_stride];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        store(to + (row + r) * STRIP + lane, sum[r][0]);
        store(to + (row + r) * STRIP + lane + LANES, sum[r][1]);
      }
    }
}

// Arithmetic in fp32 on numbers stored as T.
template <class T>
struct FloatProducts {
  static constexpr int64_t KEYS_AT_ONCE = 8;
  using Number = T;

  int64_t depth;
  float *q, *k, *v, *rows;  // [depth][STRIP], [keys][depth] twice, [STRIP][depth]

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, LANES > 8 ? LANES : 8); }
  static int64_t floats(int64_t head_dim, int64_t keys) { return padded(head_dim) * 2 * (STRIP + keys); }
  FloatProducts(float *memory, int64_t head_dim, int64_t keys)
      : depth(padded(head_dim)), q(memory), k(q + STRIP * depth), v(k + keys * depth), rows(v + keys * depth) {}

  void pack(float *to, const Heads &from, int64_t token, int64_t h, int64_t count, int64_t padded_count) const {
    for (int64_t r = 0; r < padded_count; ++r, to += depth) {
      if (r < count) read_head<T>(to, from, token + r, h);
      for (int64_t d = r < count ? from.head_dim : 0; d < depth; ++d) to[d] = 0.0f;
    }
  }
  void pack_keys(const Heads &keys, const Heads &values, int64_t token, int64_t h, int64_t count) const {
    pack(k, keys, token, h, count, round_up(count, KEYS_AT_ONCE));
    pack(v, values, token, h, count, round_up(count, KEYS_AT_ONCE));
  }
  void pack_queries(const Heads &queries, int64_t token, int64_t h, int64_t count) const {
    pack(rows, queries, token, h, count, STRIP);
    for (int64_t d = 0; d < depth; d += LANES)
      for (int64_t lane = 0; lane < STRIP; lane += LANES) {
        alignas(64) float tile[TILE];
        for (int r = 0; r < LANES; ++r) store(tile + r * LANES, load(rows + (lane + r) * depth + d));
        transpose(tile);
        for (int r = 0; r < LANES; ++r) store(q + (d + r) * STRIP + lane, load(tile + r * LANES));
      }
  }
  // scores[key][STRIP] of keys `key` to `key + count`, a multiple of KEYS_AT_ONCE
  void score(float *scores, int64_t key, int64_t count) const {
    multiply_strip(scores, q, k + key * depth, count, depth, depth, 1);
  }
  // sums[channel][STRIP] of the values of those keys, each times its weights[key][STRIP]
  void weigh(float *sums, const float *weights, int64_t key, int64_t count) const {
    multiply_strip(sums, weights, v + key * depth, depth, 1, count, depth);
  }
};

#if defined(__AVX512BF16__)

// bfloat16 tiles: keys and values' channels are rows of left tiles, queries and weights columns of right ones.
struct Bf16Products {
  static constexpr int64_t KEYS_AT_ONCE = 32;
  using Number = tl_bf16;

  int64_t depth, steps;
  float *row;                 // [depth]
  uint8_t *q, *weight_tiles;  // [2 of 16 queries][steps], [2 of 16 queries][PANEL / 32] tiles
  uint8_t *k, *v;             // [keys / 16][steps], [keys / 32][depth / 16] tiles
  MatrixUnit unit;

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, Bf16::step); }
  static int64_t floats(int64_t head_dim, int64_t keys) {
    return padded(head_dim) * (1 + STRIP / 2 + keys) + PANEL * STRIP / 2;
  }
  Bf16Products(float *memory, int64_t head_dim, int64_t keys) : depth(padded(head_dim)), steps(depth / Bf16::step) {
    const auto take = [&memory](int64_t count) { return reinterpret_cast<uint8_t *>((memory += count) - count); };
    q = take(STRIP * depth / 2);
    weight_tiles = take(PANEL * STRIP / 2);
    k = take(keys * depth / 2);
    v = take(keys * depth / 2);
    row = memory;
  }

  // Rows of left tiles.
  void pack(uint8_t *tiles, const Heads &from, int64_t token, int64_t h, int64_t count, int64_t padded_count) const {
    for (int64_t r = 0; r < padded_count; ++r) {
      uint8_t *to = tiles + r / TILE_SIDE * steps * TILE_BYTES + r % TILE_SIDE * STEP_BYTES;
      if (r >= count) {
        for (int64_t s = 0; s < steps; ++s) std::memset(to + s * TILE_BYTES, 0, STEP_BYTES);
      } else if (from.cosines == nullptr) {
        const tl_bf16 *numbers = from.at<tl_bf16>(token + r, h);
        for (int64_t s = 0; s < steps; ++s) {
          const __mmask32 present = first_of(from.head_dim - s * Bf16::step);
          _mm512_storeu_si512(to + s * TILE_BYTES, _mm512_maskz_loadu_epi16(present, numbers + s * Bf16::step));
          __builtin_prefetch(numbers + s * Bf16::step + from.head);  // what the next head's task reads
        }
      } else {
        read_head<tl_bf16>(row, from, token + r, h);
        for (int64_t d = from.head_dim; d < depth; ++d) row[d] = 0.0f;
        for (int64_t s = 0; s < steps; ++s)
          _mm512_storeu_si512(to + s * TILE_BYTES, rounded(row + s * Bf16::step, row + s * Bf16::step + TILE_SIDE));
      }
    }
  }
  void pack_keys(const Heads &keys, const Heads &values, int64_t token, int64_t h, int64_t count) const {
    const int64_t padded_count = round_up(count, KEYS_AT_ONCE);
    pack(k, keys, token, h, count, padded_count);
    for (int64_t first = 0; first < padded_count; first += 32)
      for (int64_t d = 0; d < depth; d += TILE_SIDE)
        pack_values(v + (first / 32 * depth + d) / TILE_SIDE * TILE_BYTES, values, token + first, h, count - first, d);
  }
  // 32 keys of 16 channels from `channel` on: pairs of keys are interleaved as in a right tile, which turned is a left one.
  static void pack_values(uint8_t *tile, const Heads &values, int64_t token, int64_t h, int64_t count,
                          int64_t channel) {
    const __mmask16 present = static_cast<__mmask16>(first_of(smaller(values.head_dim - channel, 16)));
    const auto read = [&](int64_t r) {
      if (r >= count || present == 0) return _mm512_setzero_si512();
      const tl_bf16 *from = values.at<tl_bf16>(token + r, h) + channel;
      __builtin_prefetch(from + values.head);
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, from));
    };
    for (int64_t group = 0; group < 16; ++group)
      _mm512_storeu_si512(tile + group * STEP_BYTES,
                          _mm512_or_si512(read(2 * group), _mm512_slli_epi32(read(2 * group + 1), 16)));
    transpose(reinterpret_cast<float *>(tile));
  }
  void pack_queries(const Heads &queries, int64_t token, int64_t h, int64_t count) const {
    pack(q, queries, token, h, count, STRIP);
    for (int64_t t = 0; t < STRIP / TILE_SIDE * steps; ++t) transpose(reinterpret_cast<float *>(q + t * TILE_BYTES));
  }
  void score(float *scores, int64_t key, int64_t count) const {
    const int64_t tile_stride = steps * TILE_BYTES;
    for (int64_t j = 0; j < count; j += 32)
      multiply_tiles<Bf16, 2, 2>(scores + j * STRIP, {k + (key + j) / TILE_SIDE * tile_stride, tile_stride, TILE_BYTES},
                                 {q, tile_stride, TILE_BYTES}, steps, nullptr);
  }
  void weigh(float *sums, const float *weights, int64_t key, int64_t count) const {
    pack_weights(weights, count);
    const Tiles right = {weight_tiles, PANEL / 32 * TILE_BYTES, TILE_BYTES};
    const int64_t step_stride = depth / TILE_SIDE * TILE_BYTES;
    for (int64_t d = 0; d < depth; d += 32)
      multiply_tiles<Bf16, 2, 2>(sums + d * STRIP,
                                 {v + key / 32 * step_stride + d / TILE_SIDE * TILE_BYTES, TILE_BYTES, step_stride},
                                 right, count / 32, nullptr);
  }
  // Two keys' weights of 16 queries are a group of a right tile.
  void pack_weights(const float *weights, int64_t count) const {
    alignas(64) static constexpr uint16_t pairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(pairs);
    for (int64_t j = 0; j < count; j += 2)
      for (int64_t column = 0; column < STRIP / TILE_SIDE; ++column) {
        const float *from = weights + j * STRIP + column * TILE_SIDE;
        _mm512_storeu_si512(weight_tiles + (column * (PANEL / 32) + j / 32) * TILE_BYTES + j % 32 / 2 * STEP_BYTES,
                            _mm512_permutexvar_epi16(order, rounded(from, from + STRIP)));
      }
  }

  static __mmask32 first_of(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
  static __m512i rounded(const float *low, const float *high) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
  }
};

#endif

}  // namespace
