// A head's rows as tiles, [rows / LANES][depth][LANES] fp32: how the CPU attention reads (B, S, H, Dh) tensors of any
// dtype and stride, and writes contiguous ones.
#pragma once

#include <cstring>

#include "dtype.h"
#include "tile.h"

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

// Rows [count, head_dim] -> tiles, times `scale`. Padding and rows that `keep` excludes become zeros, so that nothing
// stored there (NaN included) reaches a result.
template <class T>
void pack_rows(float *tiles, const T *from, int64_t stride, int64_t count, const uint8_t *keep,
                      const Shape &shape, float scale) {
  const int64_t depth = shape.depth();
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rows = smaller(LANES, count - first);
    for (int64_t d = 0; d < depth; d += LANES) {
      alignas(64) float block[TILE] = {};
      const int64_t columns = smaller(LANES, shape.head_dim - d);
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
void unpack_rows(T *to, const float *tiles, int64_t count, const Shape &shape, float scale) {
  const int64_t depth = shape.depth(), stride = shape.heads * shape.head_dim;
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rows = smaller(LANES, count - first);
    for (int64_t d = 0; d < shape.head_dim; d += LANES) {
      alignas(64) float block[TILE] = {};
      std::memcpy(block, tiles + first * depth + d * LANES, sizeof(float) * LANES * smaller(LANES, depth - d));
      transpose(block);
      const int64_t columns = smaller(LANES, shape.head_dim - d);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) tl_store(&to[(first + r) * stride + d + c], scale * block[r * LANES + c]);
    }
  }
}

// Tiles -> rows `row` to `row + count` of a contiguous (B, S, H, Dh) of `length` rows, times `scale`.
inline void unpack(void *to, const float *tiles, int dtype, int64_t b, int64_t h, int64_t length, int64_t row,
                   int64_t count, const Shape &shape, float scale) {
  tl_with_dtype(dtype, [&](auto element) {
    auto *out = static_cast<decltype(element) *>(to) + ((b * length + row) * shape.heads + h) * shape.head_dim;
    unpack_rows(out, tiles, count, shape, scale);
    return static_cast<int>(TL_OK);
  });
}

}  // namespace
