// Mean or sum of neighbours on the CPU. A task is a run of rows with about as many edges as any other (or a slice of the
// columns of a row that has very many); a row's sums stay in registers, a block of columns at a time, over all relations.
#include "isa.h"
#include "lanes.h"
#include "parallel.h"
#include "status.h"

namespace TL_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int BLOCK = 8;  // vectors of a row held at once, twice: the relation's sums and the row's
#else
constexpr int BLOCK = 4;
#endif
constexpr int64_t AHEAD = 6;        // edges whose rows are fetched before they are needed
constexpr int64_t RUN = 64;          // edges summed apart before they join the row: a long sum errs less so
constexpr int64_t LINE_BYTES = 64;
constexpr int64_t SLICES = 4;       // of the columns of a hub; as in tlfast/ops/hetero_aggregate/relation.py

struct Job {
  const tl_gather *relations;
  const void *base;
  void *y;
  int64_t count, base_stride, y_stride;
  bool relu;
};

struct Span {
  int64_t begin, end;
};

inline TL_INLINE Lanes fill(float x, Lanes) { return Lanes{} + x; }
inline TL_INLINE float fill(float x, float) { return x; }
// NaN stays NaN
inline TL_INLINE Lanes rectified(Lanes x) { return x < 0.0f ? Lanes{} : x; }
inline TL_INLINE float rectified(float x) { return x < 0.0f ? 0.0f : x; }

template <class T, int Count>
inline TL_INLINE void prefetch(const T *x) {
  constexpr int64_t bytes = Count * WIDE * sizeof(T);
  for (int64_t at = 0; at < bytes; at += LINE_BYTES) __builtin_prefetch(reinterpret_cast<const char *>(x) + at);
}

// Adds rows of x that edges [first, last) of a row that ends at `end` name; Count values of kind V.
template <class V, int Count, class T>
inline TL_INLINE void add_edges(V (&sum)[Count], const tl_gather &relation, const T *x, int64_t first, int64_t last,
                                int64_t end) {
  constexpr int64_t step = sizeof(V) / sizeof(float);
  const int32_t *col = relation.col;
  for (int64_t e = first; e < last; ++e) {
    if (step > 1 && e + AHEAD < end) prefetch<T, Count>(x + col[e + AHEAD] * relation.x_stride);
    const T *from = x + col[e] * relation.x_stride;
    if (relation.col_scale == nullptr) {
#pragma GCC unroll 8
      for (int c = 0; c < Count; ++c) sum[c] += load<V>(from + c * step);
    } else {
      const V weight = fill(relation.col_scale[col[e]], V{});
#pragma GCC unroll 8
      for (int c = 0; c < Count; ++c) sum[c] += weight * load<V>(from + c * step);
    }
  }
}

// Adds the relation's mean or sum over a row's edges to total; columns from j on, Count values of kind V.
template <class V, int Count, class T>
inline TL_INLINE void add_relation(V (&total)[Count], const tl_gather &relation, int64_t row, int64_t j) {
  const T *x = static_cast<const T *>(relation.x) + j;
  const int64_t begin = relation.rowptr[row], end = relation.rowptr[row + 1];
  const V scale = fill(relation.row_scale == nullptr ? 1.0f : relation.row_scale[row], V{});
  for (int64_t first = begin; first < end; first += RUN) {
    const int64_t last = first + RUN < end ? first + RUN : end;
    V sum[Count] = {};
    add_edges<V, Count>(sum, relation, x, first, last, end);
#pragma GCC unroll 8
    for (int c = 0; c < Count; ++c) total[c] += scale * sum[c];
  }
}

template <class V, int Count, class T>
inline TL_INLINE void finish_columns(const Job &job, int64_t row, int64_t j) {
  constexpr int64_t step = sizeof(V) / sizeof(float);
  V total[Count] = {};
  if (job.base != nullptr) {
    const T *base = static_cast<const T *>(job.base) + row * job.base_stride + j;
#pragma GCC unroll 8
    for (int c = 0; c < Count; ++c) total[c] = load<V>(base + c * step);
  }
  for (int64_t r = 0; r < job.count; ++r) add_relation<V, Count, T>(total, job.relations[r], row, j);
  T *y = static_cast<T *>(job.y) + row * job.y_stride + j;
#pragma GCC unroll 8
  for (int c = 0; c < Count; ++c) store(y + c * step, job.relu ? rectified(total[c]) : total[c]);
}

template <class T>
void finish_row(const Job &job, int64_t row, Span columns) {
  int64_t j = columns.begin;
  for (; j + BLOCK * WIDE <= columns.end; j += BLOCK * WIDE) finish_columns<Lanes, BLOCK, T>(job, row, j);
  if (j + BLOCK / 2 * WIDE <= columns.end) {
    finish_columns<Lanes, BLOCK / 2, T>(job, row, j);
    j += BLOCK / 2 * WIDE;
  }
  for (; j + WIDE <= columns.end; j += WIDE) finish_columns<Lanes, 1, T>(job, row, j);
  for (; j < columns.end; ++j) finish_columns<float, 1, T>(job, row, j);
}

// Slice of the columns, whole vectors long; -1: all of them.
inline Span slice_columns(int64_t slice, int64_t width) {
  if (slice < 0) return {0, width};
  const int64_t vectors = (width + WIDE - 1) / WIDE, each = (vectors + SLICES - 1) / SLICES * WIDE;
  const int64_t begin = slice * each < width ? slice * each : width;
  return {begin, begin + each < width ? begin + each : width};
}

template <class T>
int aggregate(const Job &job, const int32_t *tasks, int64_t num_tasks, int64_t width, int threads) {
  parallel_for(num_tasks, threads, [&](int64_t task) {
    const int32_t *line = tasks + 3 * task;
    const Span columns = slice_columns(line[2], width);
    for (int64_t row = line[0]; row < line[1]; ++row) finish_row<T>(job, row, columns);
  });
  return TL_OK;
}

}  // namespace

int tl_hetero_aggregate_cpu(const tl_gather *relations, const void *base, void *y, const int32_t *tasks,
                            int64_t num_tasks, int64_t num_relations, int64_t width, int64_t base_stride,
                            int64_t y_stride, int dtype, int relu, int threads) {
  const Job job{relations, base, y, num_relations, base_stride, y_stride, relu != 0};
  if (dtype == TL_F32) return aggregate<float>(job, tasks, num_tasks, width, threads);
  if (dtype == TL_BF16) return aggregate<tl_bf16>(job, tasks, num_tasks, width, threads);
  return tl_fail(TL_BAD_ARGUMENT, "hetero_aggregate: dtype code %d is neither float32 nor bfloat16", dtype);
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_hetero_aggregate_cpu,
             (const tl_gather *relations, const void *base, void *y, const int32_t *tasks, int64_t num_tasks,
              int64_t num_relations, int64_t width, int64_t base_stride, int64_t y_stride, int dtype, int relu,
              int threads),
             (relations, base, y, tasks, num_tasks, num_relations, width, base_stride, y_stride, dtype, relu, threads))
