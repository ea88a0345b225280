// A head's rows as tiles, [rows / LANES][depth][LANES] fp32: how the CPU attention reads (B, S, H, Dh) tensors of any
// dtype and stride, and writes them.
#pragma once

#include <cstring>

#include "dtype.h"
#include "tile.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Shape {
  int64_t batch, heads, queries, keys, head_dim;
  int64_t depth() const { return (head_dim + 3) / 4 * 4; }
  int64_t padded_keys() const { return (keys + LANES - 1) / LANES * LANES; }
  int64_t causal_shift() const { return keys - queries; }  // query i sees keys up to i + shift
};

// (B, S, H, Dh) with any strides but the last, which is 1.
struct View {
  const void *data;
  int64_t batch, row, head;
};
struct Target {
  void *data;
  int64_t batch, row, head;
};

#if defined(__AVX512F__)

// A transpose of 16 rows of up to 8 columns: row r + 8 beside row r, then 8 vectors stand for 16. The first `depth` are
// written.
inline void pack_narrow(float *tile, const float *from, int64_t stride, int64_t rows, const uint8_t *keep,
                        int64_t columns, int64_t depth, float scale) {
  const __mmask8 there = static_cast<__mmask8>((1u << columns) - 1);
  const auto row = [&](int64_t r) {
    const bool read = r < rows && (keep == nullptr || keep[r]);
    return _mm256_maskz_loadu_ps(read ? there : 0, from + (read ? r : 0) * stride);
  };
  Vector both[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    both[r] = scale * (Vector)_mm512_insertf32x8(_mm512_castps256_ps512(row(r)), row(r + 8), 1);
  exchange_blocks<4, 8>(both);
#pragma GCC unroll 8
  for (int d = 0; d < 8; ++d)
    if (d < depth) store(tile + d * LANES, both[d]);
}

inline void unpack_narrow(float *to, int64_t stride, const float *tile, int64_t rows, int64_t columns, int64_t depth,
                          float scale) {
  const __mmask8 there = static_cast<__mmask8>((1u << columns) - 1);
  Vector both[8];
#pragma GCC unroll 8
  for (int d = 0; d < 8; ++d) both[d] = d < depth ? scale * load(tile + d * LANES) : Vector{};
  exchange_blocks<4, 8>(both);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    if (r < rows) _mm256_mask_storeu_ps(to + r * stride, there, _mm512_castps512_ps256((__m512)both[r]));
    if (r + 8 < rows) _mm256_mask_storeu_ps(to + (r + 8) * stride, there, _mm512_extractf32x8_ps((__m512)both[r], 1));
  }
}

template <class T>
constexpr bool HAS_NARROW = sizeof(T) == sizeof(float);

#else

template <class T>
constexpr bool HAS_NARROW = false;
inline void pack_narrow(float *, const void *, int64_t, int64_t, const uint8_t *, int64_t, int64_t, float) {}
inline void unpack_narrow(void *, int64_t, const float *, int64_t, int64_t, int64_t, float) {}

#endif

// Rows [count, head_dim] -> tiles, times `scale`. Padding and rows that `keep` excludes become zeros, so that nothing
// stored there (NaN included) reaches a result.
template <class T>
void pack_rows(float *tiles, const T *from, int64_t stride, int64_t count, const uint8_t *keep,
                      const Shape &shape, float scale) {
  const int64_t depth = shape.depth();
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rows = smaller(LANES, count - first);
    for (int64_t d = 0; d < depth; d += LANES) {
      const int64_t columns = smaller(LANES, shape.head_dim - d);
      if constexpr (HAS_NARROW<T>)
        if (columns <= 8) {
          pack_narrow(tiles + first * depth + d * LANES, from + first * stride + d, stride, rows,
                      keep == nullptr ? nullptr : keep + first, columns, depth - d, scale);
          continue;
        }
      alignas(64) float block[TILE] = {};
      for (int64_t r = 0; r < rows; ++r) {
        if (keep != nullptr && !keep[first + r]) continue;
        const T *row = from + (first + r) * stride + d;
        for (int64_t c = 0; c < columns; ++c) block[r * LANES + c] = scale * tl_load(row[c]);
      }
      transpose(block);
      std::memcpy(tiles + first * depth + d * LANES, block, sizeof(float) * LANES * smaller(LANES, depth - d));
    }
  }
}

inline void pack(float *tiles, const View &view, int dtype, int64_t b, int64_t h, int64_t row, int64_t count,
                 const uint8_t *keep, const Shape &shape, float scale) {
  tl_with_dtype(dtype, [&](auto element) {
    const auto *data = static_cast<const decltype(element) *>(view.data);
    pack_rows(tiles, data + b * view.batch + row * view.row + h * view.head, view.row, count, keep, shape, scale);
    return static_cast<int>(TL_OK);
  });
}

template <class T>
void unpack_rows(T *to, int64_t stride, const float *tiles, int64_t count, const Shape &shape, float scale) {
  const int64_t depth = shape.depth();
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rows = smaller(LANES, count - first);
    for (int64_t d = 0; d < shape.head_dim; d += LANES) {
      const int64_t columns = smaller(LANES, shape.head_dim - d);
      if constexpr (HAS_NARROW<T>)
        if (columns <= 8) {
          unpack_narrow(to + first * stride + d, stride, tiles + first * depth + d * LANES, rows, columns, depth - d,
                        scale);
          continue;
        }
      alignas(64) float block[TILE] = {};
      std::memcpy(block, tiles + first * depth + d * LANES, sizeof(float) * LANES * smaller(LANES, depth - d));
      transpose(block);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) tl_store(&to[(first + r) * stride + d + c], scale * block[r * LANES + c]);
    }
  }
}

// Tiles -> rows `row` to `row + count`, times `scale`.
inline void unpack(const Target &target, const float *tiles, int dtype, int64_t b, int64_t h, int64_t row,
                   int64_t count, const Shape &shape, float scale) {
  tl_with_dtype(dtype, [&](auto element) {
    auto *to = static_cast<decltype(element) *>(target.data);
    unpack_rows(to + b * target.batch + row * target.row + h * target.head, target.row, tiles, count, shape, scale);
    return static_cast<int>(TL_OK);
  });
}

}  // namespace
