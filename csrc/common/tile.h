// Square tiles of floats, TL_LANES x TL_LANES, as the CPU attention uses them: GCC/Clang vector extensions instead of
// intrinsics, so the same source serves every instruction set.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
#define TL_LANES 16
#elif defined(__AVX2__)
#define TL_LANES 8
#else
#define TL_LANES 4
#endif

namespace {

constexpr int LANES = TL_LANES;
constexpr int TILE = LANES * LANES;

typedef float Vector __attribute__((vector_size(4 * TL_LANES)));
typedef float UnalignedVector __attribute__((vector_size(4 * TL_LANES), aligned(4), may_alias));

inline Vector load(const float *from) { return *reinterpret_cast<const UnalignedVector *>(from); }
inline void store(float *to, Vector x) { *reinterpret_cast<UnalignedVector *>(to) = x; }
inline Vector splat(float x) { return x - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// Of two rows: the lanes without bit `Half`, then those with it; what each step of the transpose exchanges.
template <int Half, int... Lane>
inline Vector low_halves(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, ((Lane & Half) ? LANES + Lane - Half : Lane)...);
}
template <int Half, int... Lane>
inline Vector high_halves(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, ((Lane & Half) ? LANES + Lane : Lane + Half)...);
}

template <int Half, int Rows = LANES>
inline void exchange_blocks(Vector *rows) {
  using Lanes = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (r & Half) continue;
    const Vector low = low_halves<Half>(rows[r], rows[r + Half], Lanes{});
    rows[r + Half] = high_halves<Half>(rows[r], rows[r + Half], Lanes{});
    rows[r] = low;
  }
  if constexpr (Half > 1) exchange_blocks<Half / 2, Rows>(rows);
}

// In place, log2(LANES) rounds of exchanges in registers.
inline void transpose(float *tile) {
  Vector rows[LANES];
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) rows[r] = load(tile + r * LANES);
  exchange_blocks<LANES / 2>(rows);
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) store(tile + r * LANES, rows[r]);
}

// tile[j][lane] = sum_d x[d][lane] * y[d][j]; x and y are [depth, LANES].
inline void multiply_tile(float *tile, const float *x, const float *y, int64_t depth) {
  Vector sum[LANES] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const Vector xd = load(x + d * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) sum[j] += xd * y[d * LANES + j];
  }
#pragma GCC unroll 16
  for (int j = 0; j < LANES; ++j) store(tile + j * LANES, sum[j]);
}

template <int Count>
inline void accumulate_rows(float *out, const float *tile, const float *y) {
  Vector sum[Count];
#pragma GCC unroll 8
  for (int d = 0; d < Count; ++d) sum[d] = load(out + d * LANES);
#pragma GCC unroll 16
  for (int j = 0; j < LANES; ++j) {
    const Vector x = load(tile + j * LANES);
#pragma GCC unroll 8
    for (int d = 0; d < Count; ++d) sum[d] += x * y[d * LANES + j];
  }
#pragma GCC unroll 8
  for (int d = 0; d < Count; ++d) store(out + d * LANES, sum[d]);
}

// out[d][lane] += sum_j tile[j][lane] * y[d][j]; out and y are [depth, LANES], depth a multiple of 4.
inline void accumulate_tile(float *out, const float *tile, const float *y, int64_t depth) {
  int64_t d = 0;
  for (; d + 8 <= depth; d += 8) accumulate_rows<8>(out + d * LANES, tile, y + d * LANES);
  if (d < depth) accumulate_rows<4>(out + d * LANES, tile, y + d * LANES);
}

}  // namespace
