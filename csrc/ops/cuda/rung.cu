// The memory-bound part of a rung on the GPU; the GEMMs around it are torch's. Both kernels stream their operands once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "status.h"

namespace {

constexpr int LANES = 32;          // channels a block covers, one a lane: neighbouring threads read neighbouring channels
constexpr int ROWS_IN_FLIGHT = 8;  // rows a block works on at a time
constexpr int MAX_ROW_BLOCKS = 2048;

__device__ inline float load(const float *x) { return *x; }
__device__ inline float load(const __half *x) { return __half2float(*x); }
__device__ inline float load(const __nv_bfloat16 *x) { return __bfloat162float(*x); }
__device__ inline void store(float *to, float x) { *to = x; }
__device__ inline void store(__half *to, float x) { *to = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16 *to, float x) { *to = __float2bfloat16_rn(x); }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class P, class S>
__global__ void rung_fwd_kernel(const P *p, const S *s, const float *bias, const float *alpha, S *z, int64_t rows,
                                int64_t width, int64_t num_alpha, int64_t p_stride, int64_t s_stride,
                                float temperature) {
  const int64_t j = static_cast<int64_t>(blockIdx.y) * LANES + threadIdx.x;
  if (j >= width) return;
  const float x = alpha[num_alpha == 1 ? 0 : j] / temperature;
  const float mu = sigmoid(x), rest = sigmoid(-x);
  const float offset = bias == nullptr ? 0.0f : rest * bias[j];
  const int64_t step = static_cast<int64_t>(gridDim.x) * ROWS_IN_FLIGHT;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * ROWS_IN_FLIGHT + threadIdx.y; i < rows; i += step)
    store(z + i * width + j, mu * load(s + i * s_stride + j) + (rest * load(p + i * p_stride + j) + offset));
}

template <class S>
__global__ void rung_bwd_kernel(const S *dz, const S *s, const S *z, const float *alpha, S *ds, double *dbias,
                                double *dalpha, int64_t rows, int64_t width, int64_t num_alpha, int64_t dz_stride,
                                int64_t s_stride, int64_t z_stride, float temperature) {
  const int64_t j = static_cast<int64_t>(blockIdx.y) * LANES + threadIdx.x;
  const bool inside = j < width;
  const float x = inside ? alpha[num_alpha == 1 ? 0 : j] / temperature : 0.0f;
  const float mu = sigmoid(x), rest = sigmoid(-x);
  double sum_dz = 0.0, sum_gate = 0.0;  // a chain of thousands of tokens, which PyTorch adds in a tree
  const int64_t step = static_cast<int64_t>(gridDim.x) * ROWS_IN_FLIGHT;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * ROWS_IN_FLIGHT + threadIdx.y; inside && i < rows; i += step) {
    const float g = load(dz + i * dz_stride + j);
    sum_dz += g;
    sum_gate += g * (load(s + i * s_stride + j) - load(z + i * z_stride + j));
    if (ds != nullptr) store(ds + i * width + j, mu * g);
  }

  __shared__ double sums[2][ROWS_IN_FLIGHT][LANES];
  sums[0][threadIdx.y][threadIdx.x] = sum_dz;
  sums[1][threadIdx.y][threadIdx.x] = sum_gate;
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int row = 1; row < ROWS_IN_FLIGHT; ++row) {
    sum_dz += sums[0][row][threadIdx.x];
    sum_gate += sums[1][row][threadIdx.x];
  }
  if (inside && dbias != nullptr) atomicAdd(dbias + j, rest * sum_dz);
  if (dalpha == nullptr) return;
  double gate = mu / temperature * sum_gate;
  if (num_alpha != 1) {
    if (inside) atomicAdd(dalpha + j, gate);
    return;
  }
  for (int offset = LANES / 2; offset > 0; offset /= 2) gate += __shfl_down_sync(0xffffffffu, gate, offset);
  if (threadIdx.x == 0) atomicAdd(dalpha, gate);
}

dim3 grid(int64_t rows, int64_t width) {
  const int64_t row_blocks = (rows + ROWS_IN_FLIGHT - 1) / ROWS_IN_FLIGHT;
  return dim3(static_cast<unsigned>(std::min<int64_t>(row_blocks, MAX_ROW_BLOCKS)),
              static_cast<unsigned>((width + LANES - 1) / LANES));
}

int launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? TL_OK : tl_fail(TL_CUDA_ERROR, "rung: CUDA launch failed: %s", cudaGetErrorString(error));
}

template <class Body>
int with_dtype(int dtype, Body body) {
  switch (dtype) {
    case TL_F32:
      return body(float{});
    case TL_F16:
      return body(__half{});
    case TL_BF16:
      return body(__nv_bfloat16{});
    default:
      return tl_fail(TL_BAD_ARGUMENT, "unknown dtype code %d", dtype);
  }
}

}  // namespace

extern "C" int tl_rung_forward_cuda(const void *p, const void *s, const float *bias, const float *alpha, void *z,
                                    int64_t rows, int64_t width, int64_t num_alpha, int64_t p_stride, int64_t s_stride,
                                    int p_dtype, int s_dtype, float temperature, void *stream) {
  if (rows == 0 || width == 0) return TL_OK;
  return with_dtype(p_dtype, [&](auto p_element) {
    return with_dtype(s_dtype, [&](auto s_element) {
      using P = decltype(p_element);
      using S = decltype(s_element);
      rung_fwd_kernel<P, S><<<grid(rows, width), dim3(LANES, ROWS_IN_FLIGHT), 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const P *>(p), static_cast<const S *>(s), bias, alpha, static_cast<S *>(z), rows, width, num_alpha,
          p_stride, s_stride, temperature);
      return launched();
    });
  });
}

extern "C" int tl_rung_backward_cuda(const void *dz, const void *s, const void *z, const float *alpha, void *ds,
                                     double *dbias, double *dalpha, int64_t rows, int64_t width, int64_t num_alpha,
                                     int64_t dz_stride, int64_t s_stride, int64_t z_stride, int dtype,
                                     float temperature, void *stream) {
  if (rows == 0 || width == 0) return TL_OK;
  return with_dtype(dtype, [&](auto element) {
    using S = decltype(element);
    rung_bwd_kernel<S><<<grid(rows, width), dim3(LANES, ROWS_IN_FLIGHT), 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const S *>(dz), static_cast<const S *>(s), static_cast<const S *>(z), alpha, static_cast<S *>(ds),
        dbias, dalpha, rows, width, num_alpha, dz_stride, s_stride, z_stride, temperature);
    return launched();
  });
}
