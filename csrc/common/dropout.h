// Stateless dropout: whether entry (row, column) is kept is a hash of seed, row and column, so a backward pass recomputes
// the mask instead of storing it, and CPU and GPU agree bit for bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TL_HOST_DEVICE __host__ __device__
#else
#define TL_HOST_DEVICE
#endif

// One key a row: the low 32 bits of the splitmix64 sequence that starts at `seed`, at position row + 1.
TL_HOST_DEVICE static inline uint32_t tl_dropout_row_key(uint64_t seed, uint64_t row) {
  uint64_t x = seed + (row + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>(x ^ (x >> 31));
}

// Drop probability as a threshold on the hash.
TL_HOST_DEVICE static inline uint32_t tl_dropout_threshold(double probability) {
  return static_cast<uint32_t>(probability * 4294967296.0);
}

// The lowbias32 hash of column and row key; cheap integer code that vectorises over columns.
TL_HOST_DEVICE static inline bool tl_dropout_keep(uint32_t row_key, uint32_t column, uint32_t threshold) {
  uint32_t x = column * 0x9E3779B9u + row_key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return (x ^ (x >> 16)) >= threshold;
}
