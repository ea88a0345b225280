// Mean or sum of neighbours on the GPU. A row is read by just enough lanes for 16 bytes each (one element where rows are
// not aligned), and its sums stay in their registers over all relations. A task is a run of rows with about as many edges
// as any other; of a row with very many, a slice of the columns, whose edges the whole block shares.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "status.h"
#include "tlfast.h"

namespace {

constexpr int THREADS = 256;
constexpr int BLOCKS_A_TASK = 4;  // that share the rows of one: tasks are cut for CPU threads, which are fewer
constexpr int MAX_RELATIONS = 32;
constexpr int SLICES = 4;         // of the columns of a hub; as in tlfast/ops/hetero_aggregate/relation.py
constexpr int IN_FLIGHT = 16;     // numbers of rows on their way at once, in a lane

struct Job {
  tl_gather relations[MAX_RELATIONS];
  const void *base;
  void *y;
  int64_t width, base_stride, y_stride;
  int count;
  bool relu;
};

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float *to, float x) { *to = x; }
__device__ inline void narrow(__nv_bfloat16 *to, float x) { *to = __float2bfloat16_rn(x); }

// Sums in float32 with what they have rounded away beside them (Knuth's two-sum): a row of many edges is a chain of
// thousands of additions, of which each would round the whole sum. What ends in bfloat16 does without.
template <class T, int V>
struct Sums {
  static constexpr bool exact = sizeof(T) == sizeof(float);
  float sum[V] = {}, lost[exact ? V : 1] = {};

  __device__ inline void add(int v, float x) {
    const float before = sum[v];
    sum[v] += x;
    if constexpr (exact) {
      const float added = sum[v] - before;
      lost[v] += (before - (sum[v] - added)) + (x - added);
    }
  }

  __device__ inline float get(int v) const {
    if constexpr (exact) return lost[v] == lost[v] ? sum[v] + lost[v] : sum[v];  // beside an infinity NaN is lost
    else return sum[v];
  }
};

// sums += weight * x over edges [first, end) by `step`; columns from j on.
template <class T, int V>
__device__ inline void gather(Sums<T, V> &sums, const tl_gather &relation, int64_t first, int64_t end, int64_t step,
                              int64_t j) {
  constexpr int UNROLL = V >= 4 ? IN_FLIGHT / V : 4;
  const T *x = static_cast<const T *>(relation.x) + j;
  for (int64_t e = first; e < end; e += UNROLL * step) {
    Pack<T, V> rows[UNROLL];
    float weights[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const bool inside = e + u * step < end;
      const int64_t source = relation.col[inside ? e + u * step : first];
      weights[u] = !inside ? 0.0f : relation.col_scale == nullptr ? 1.0f : relation.col_scale[source];
      rows[u] = *reinterpret_cast<const Pack<T, V> *>(x + source * relation.x_stride);
    }
    float few[V] = {};
    float(&to)[V] = *(Sums<T, V>::exact ? &few : &sums.sum);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (e + u * step >= end) break;  // 0 times infinity would be NaN
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] += weights[u] * widen(rows[u].values[v]);
    }
    if constexpr (Sums<T, V>::exact)
#pragma unroll
      for (int v = 0; v < V; ++v) sums.add(v, few[v]);
  }
}

template <class T, int V>
__device__ inline void add_base(float (&total)[V], const Job &job, int64_t row, int64_t j) {
  if (job.base == nullptr) return;
  const auto pack =
      *reinterpret_cast<const Pack<T, V> *>(static_cast<const T *>(job.base) + row * job.base_stride + j);
#pragma unroll
  for (int v = 0; v < V; ++v) total[v] += widen(pack.values[v]);
}

template <class T, int V>
__device__ inline void finish(const float (&total)[V], const Job &job, int64_t row, int64_t j) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(&pack.values[v], job.relu && total[v] < 0.0f ? 0.0f : total[v]);
  *reinterpret_cast<Pack<T, V> *>(static_cast<T *>(job.y) + row * job.y_stride + j) = pack;
}

__device__ inline float row_scale(const tl_gather &relation, int64_t row) {
  return relation.row_scale == nullptr ? 1.0f : relation.row_scale[row];
}

// Lanes for one row of so many packs: a power of two, at most a warp's.
__device__ inline int lanes_for(int64_t packs) {
  int lanes = 1;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  return lanes;
}

template <class T, int V>
__device__ void aggregate_rows(const Job &job, int64_t first, int64_t end) {
  const int lanes = lanes_for((job.width + V - 1) / V), teams = THREADS / lanes;
  const int64_t begin = first + blockIdx.y * teams + threadIdx.x / lanes;
  for (int64_t row = begin; row < end; row += static_cast<int64_t>(gridDim.y) * teams)
    for (int64_t j = static_cast<int64_t>(threadIdx.x % lanes) * V; j < job.width; j += lanes * V) {
      float total[V] = {};
      add_base<T, V>(total, job, row, j);
      for (int r = 0; r < job.count; ++r) {
        const tl_gather &relation = job.relations[r];
        Sums<T, V> sums;
        gather<T, V>(sums, relation, relation.rowptr[row], relation.rowptr[row + 1], 1, j);
        const float scale = row_scale(relation, row);
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += scale * sums.get(v);
      }
      finish<T, V>(total, job, row, j);
    }
}

// One row's columns [begin, end): teams of lanes share its edges, and add up in a fixed order.
template <class T, int V>
__device__ void aggregate_hub(const Job &job, int64_t row, int64_t begin, int64_t end) {
  __shared__ float parts[THREADS * V];
  const int lanes = lanes_for((end - begin + V - 1) / V), teams = THREADS / lanes;
  const int team = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (int64_t block = begin; block < end; block += lanes * V) {
    const int64_t j = block + lane * V;
    float total[V] = {};
    for (int r = 0; j < end && r < job.count; ++r) {
      const tl_gather &relation = job.relations[r];
      Sums<T, V> sums;
      gather<T, V>(sums, relation, relation.rowptr[row] + team, relation.rowptr[row + 1], teams, j);
      const float scale = row_scale(relation, row);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += scale * sums.get(v);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) parts[threadIdx.x * V + v] = total[v];
    __syncthreads();
    if (team == 0 && j < end) {
      Sums<T, V> sums;
      for (int other = 0; other < teams; ++other)
#pragma unroll
        for (int v = 0; v < V; ++v) sums.add(v, parts[(other * lanes + lane) * V + v]);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] = sums.get(v);
      add_base<T, V>(total, job, row, j);
      finish<T, V>(total, job, row, j);
    }
    __syncthreads();
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS) hetero_aggregate_fwd_kernel(const Job job, const int32_t *tasks) {
  const int32_t *task = tasks + 3 * static_cast<int64_t>(blockIdx.x);
  if (task[2] < 0) {
    aggregate_rows<T, V>(job, task[0], task[1]);
  } else if (blockIdx.y == 0) {
    const int64_t packs = (job.width + V - 1) / V, each = (packs + SLICES - 1) / SLICES * V;
    aggregate_hub<T, V>(job, task[0], min(task[2] * each, job.width), min((task[2] + 1) * each, job.width));
  }
}

template <class T>
bool aligned(const Job &job) {
  const auto whole = [](const void *pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  };
  bool all = whole(job.base, job.base == nullptr ? 0 : job.base_stride) && whole(job.y, job.y_stride);
  for (int r = 0; r < job.count; ++r) all = all && whole(job.relations[r].x, job.relations[r].x_stride);
  return all && job.width * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class T>
int launch(const Job &job, const int32_t *tasks, int64_t num_tasks, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(num_tasks), BLOCKS_A_TASK);
  if (aligned<T>(job))
    hetero_aggregate_fwd_kernel<T, 16 / sizeof(T)><<<grid, THREADS, 0, stream>>>(job, tasks);
  else
    hetero_aggregate_fwd_kernel<T, 1><<<grid, THREADS, 0, stream>>>(job, tasks);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return TL_OK;
  return tl_fail(TL_CUDA_ERROR, "hetero_aggregate: CUDA launch failed: %s", cudaGetErrorString(error));
}

}  // namespace

extern "C" int tl_hetero_aggregate_cuda(const tl_gather *relations, const void *base, void *y, const int32_t *tasks,
                                        int64_t num_tasks, int64_t num_relations, int64_t width, int64_t base_stride,
                                        int64_t y_stride, int dtype, int relu, void *stream) {
  if (dtype != TL_F32 && dtype != TL_BF16)
    return tl_fail(TL_BAD_ARGUMENT, "hetero_aggregate: dtype code %d is neither float32 nor bfloat16", dtype);
  if (num_tasks == 0 || width == 0) return TL_OK;
  Job job{{}, base, y, width, base_stride, y_stride, 0, false};
  for (int64_t first = 0; first < num_relations; first += MAX_RELATIONS) {
    const int64_t end = std::min<int64_t>(num_relations, first + MAX_RELATIONS);
    std::copy(relations + first, relations + end, job.relations);
    job.count = static_cast<int>(end - first);
    job.relu = relu != 0 && end == num_relations;
    const auto on = static_cast<cudaStream_t>(stream);
    const int status = dtype == TL_F32 ? launch<float>(job, tasks, num_tasks, on)
                                       : launch<__nv_bfloat16>(job, tasks, num_tasks, on);
    if (status != TL_OK) return status;
    job.base = y;  // what does not fit one launch adds to what the one before left
    job.base_stride = y_stride;
  }
  return TL_OK;
}
