// Rows of floats in CPU kernels: their hand-out to threads, sums over them that have the same bits for any number of
// threads, and dropout of one with the mask of dropout.h.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"

namespace {

// Elements a chunk of rows holds: enough to hide the hand-out, little enough to balance the threads.
constexpr int64_t CHUNK_ELEMENTS = 8192;
// A sum over rows is taken of each of at most so many chunks apart, then over those in order: the same bits for any
// number of threads.
constexpr int64_t MAX_PARTIAL_SUMS = 64;
// Rows added up in float before their sum joins the chunk's, in double: as accurate as a pairwise sum.
constexpr int64_t BLOCK_ROWS = 8;

// Calls body(row) for every row; a thread takes a chunk of them at a time.
template <class Body>
inline void for_each_row(int64_t rows, int64_t width, int threads, Body body) {
  if (rows == 0 || width == 0) return;
  const int64_t chunk_rows = width < CHUNK_ELEMENTS ? CHUNK_ELEMENTS / width : 1;
  parallel_for((rows + chunk_rows - 1) / chunk_rows, threads, [&](int64_t chunk) {
    const int64_t first = chunk * chunk_rows, end = first + chunk_rows < rows ? first + chunk_rows : rows;
    for (int64_t row = first; row < end; ++row) body(row);
  });
}

// The same for body(row, scratch), where a row needs a row of floats to work in; the threads have one each.
template <class Body>
inline int for_each_row_with_scratch(int64_t rows, int64_t width, int threads, Body body) {
  if (rows == 0 || width == 0) return TL_OK;
  constexpr int64_t LINE = 64 / sizeof(float);
  const int64_t chunk_rows = width < CHUNK_ELEMENTS ? CHUNK_ELEMENTS / width : 1;
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows, most = threads < 1 ? 1 : threads;
  const int64_t workers = chunks < most ? chunks : most;
  const int64_t size = (width + LINE - 1) / LINE * LINE;
  Scratch scratch(workers * size + LINE);
  if (scratch.data == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "no memory for %lld floats of scratch", static_cast<long long>(workers * size));
  float *aligned = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(scratch.data) + 63) / 64 * 64);
  struct alignas(128) {  // on cache lines of its own: what shares one with it would be fetched anew after each chunk
    int64_t chunk = 0;
  } next;
  parallel_for(workers, threads, [&](int64_t worker) {
    float *mine = aligned + worker * size;
    for (int64_t chunk = __atomic_fetch_add(&next.chunk, 1, __ATOMIC_RELAXED); chunk < chunks;
         chunk = __atomic_fetch_add(&next.chunk, 1, __ATOMIC_RELAXED)) {
      const int64_t first = chunk * chunk_rows, end = first + chunk_rows < rows ? first + chunk_rows : rows;
      for (int64_t row = first; row < end; ++row) body(row, mine);
    }
  });
  return TL_OK;
}

// Rows of a chunk where each chunk is summed apart.
inline int64_t summed_chunk_rows(int64_t rows, int64_t width) {
  const int64_t fewest = (rows + MAX_PARTIAL_SUMS - 1) / MAX_PARTIAL_SUMS;
  const int64_t enough = width < CHUNK_ELEMENTS ? CHUNK_ELEMENTS / width : 1;
  return enough < fewest ? fewest : enough;
}

// Adds a block's sums to the chunk's and clears them.
inline void flush(float *__restrict block, double *__restrict chunk, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    chunk[j] += block[j];
    block[j] = 0.0f;
  }
}

struct Dropout {
  uint32_t threshold;
  float kept;  // 1/(1-p), the factor of what stays
  uint64_t seed;
  Dropout(double p, uint64_t s)
      : threshold(tl_dropout_threshold(p)), kept(static_cast<float>(1.0 / (1.0 - p))), seed(s) {}
};

// sum = residual + dropout(x)
inline void add_dropped_row(const float *x, const float *residual, float *sum, const Dropout &dropout, int64_t row,
                            int64_t width) {
  if (dropout.threshold == 0) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) sum[j] = residual[j] + x[j];
    return;
  }
  const uint32_t key = tl_dropout_row_key(dropout.seed, static_cast<uint64_t>(row)), threshold = dropout.threshold;
  const float kept = dropout.kept;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    sum[j] = residual[j] + (tl_dropout_keep(key, static_cast<uint32_t>(j), threshold) ? kept * x[j] : 0.0f);
}

// dropped = dropout(x)
inline void drop_row(const float *__restrict x, float *__restrict dropped, const Dropout &dropout, int64_t row,
                     int64_t width) {
  const uint32_t key = tl_dropout_row_key(dropout.seed, static_cast<uint64_t>(row)), threshold = dropout.threshold;
  const float kept = dropout.kept;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    dropped[j] = tl_dropout_keep(key, static_cast<uint32_t>(j), threshold) ? kept * x[j] : 0.0f;
}

}  // namespace
