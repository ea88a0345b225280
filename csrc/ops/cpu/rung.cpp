// The memory-bound part of a rung on the CPU; the product p = h W^T before it and dW = dz^T h after it are GEMMs that
// the caller gives to torch.
#include <algorithm>
#include <cmath>

#include "dtype.h"
#include "isa.h"
#include "rows.h"
#include "scratch.h"

namespace TL_ISA {

// mu = sigmoid(alpha/T) and 1 - mu = sigmoid(-alpha/T), one of each per channel, [width]
static void gates(const float *alpha, int64_t num_alpha, float temperature, int64_t width, float *mu, float *rest) {
  for (int64_t j = 0; j < width; ++j) {
    const double x = static_cast<double>(alpha[num_alpha == 1 ? 0 : j]) / temperature;
    mu[j] = static_cast<float>(1.0 / (1.0 + std::exp(-x)));
    rest[j] = static_cast<float>(1.0 / (1.0 + std::exp(x)));
  }
}

static int check_gates(int64_t num_alpha, int64_t width) {
  if (num_alpha == 1 || num_alpha == width) return TL_OK;
  return tl_fail(TL_BAD_ARGUMENT, "alpha has %lld entries; allowed: 1 or the width %lld", (long long)num_alpha,
                 (long long)width);
}

template <class P, class S>
static void blend_row(const P *p, const S *s, const float *mu, const float *rest, const float *offset, S *z,
                      int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) tl_store(&z[j], mu[j] * tl_load(s[j]) + (rest[j] * tl_load(p[j]) + offset[j]));
}

int tl_rung_forward_cpu(const void *p, const void *s, const float *bias, const float *alpha, void *z, int64_t rows,
                        int64_t width, int64_t num_alpha, int64_t p_stride, int64_t s_stride, int p_dtype, int s_dtype,
                        float temperature, int threads) {
  if (rows == 0 || width == 0) return TL_OK;
  if (int status = check_gates(num_alpha, width)) return status;
  Scratch scratch(3 * width);
  if (scratch.data == nullptr) return tl_fail(TL_OUT_OF_MEMORY, "rung: no memory for %lld floats", 3LL * width);
  float *mu = scratch.data, *rest = mu + width, *offset = rest + width;
  gates(alpha, num_alpha, temperature, width, mu, rest);
  for (int64_t j = 0; j < width; ++j) offset[j] = bias == nullptr ? 0.0f : rest[j] * bias[j];

  return tl_with_dtype(p_dtype, [&](auto p_element) {
    return tl_with_dtype(s_dtype, [&](auto s_element) {
      const auto *p_data = static_cast<const decltype(p_element) *>(p);
      const auto *s_data = static_cast<const decltype(s_element) *>(s);
      auto *z_data = static_cast<decltype(s_element) *>(z);
      for_each_row(rows, width, threads, [&](int64_t i) {
        blend_row(p_data + i * p_stride, s_data + i * s_stride, mu, rest, offset, z_data + i * width, width);
      });
      return static_cast<int>(TL_OK);
    });
  });
}

template <class S>
static void scale_row(const S *__restrict dz, const float *__restrict mu, S *__restrict ds, int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) tl_store(&ds[j], mu[j] * tl_load(dz[j]));
}

template <class S>
static void sum_row(const S *__restrict dz, const S *__restrict s, const S *__restrict z, float *__restrict sum_dz,
                    float *__restrict sum_gate, int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const float g = tl_load(dz[j]);
    sum_dz[j] += g;
    sum_gate[j] += g * (tl_load(s[j]) - tl_load(z[j]));
  }
}

// Adds up the chunks' sums, [chunks, 2, width], and applies the gates.
static void finish_sums(const double *partial, int64_t chunks, const float *mu, const float *rest, int64_t width,
                        int64_t num_alpha, float temperature, float *dbias, float *dalpha) {
  double total_gate = 0.0;
  for (int64_t j = 0; j < width; ++j) {
    double sum_dz = 0.0, sum_gate = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum_dz += partial[(2 * chunk) * width + j];
      sum_gate += partial[(2 * chunk + 1) * width + j];
    }
    total_gate += sum_gate;
    if (dbias != nullptr) dbias[j] = static_cast<float>(rest[j] * sum_dz);
    if (dalpha != nullptr && num_alpha == width) dalpha[j] = static_cast<float>(mu[j] / temperature * sum_gate);
  }
  if (dalpha != nullptr && num_alpha == 1) dalpha[0] = static_cast<float>(mu[0] / temperature * total_gate);
}

int tl_rung_backward_cpu(const void *dz, const void *s, const void *z, const float *alpha, void *ds, float *dbias,
                         float *dalpha, int64_t rows, int64_t width, int64_t num_alpha, int64_t dz_stride,
                         int64_t s_stride, int64_t z_stride, int dtype, float temperature, int threads) {
  if (width == 0) {
    if (dalpha != nullptr && num_alpha == 1) dalpha[0] = 0.0f;
    return TL_OK;
  }
  if (int status = check_gates(num_alpha, width)) return status;
  const int64_t chunk_rows = summed_chunk_rows(rows, width);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool sums = dbias != nullptr || dalpha != nullptr;
  const int64_t sum_size = sums ? chunks * 2 * width : 0;
  Scratch gate_memory(2 * width), block_memory(sum_size);
  ScratchOf<double> chunk_memory(sum_size);
  if (!gate_memory.data || (sums && (!block_memory.data || !chunk_memory.data)))
    return tl_fail(TL_OUT_OF_MEMORY, "rung: no memory for %lld sums", static_cast<long long>(sum_size));
  float *mu = gate_memory.data, *rest = mu + width;
  std::fill_n(block_memory.data, sum_size, 0.0f);
  std::fill_n(chunk_memory.data, sum_size, 0.0);
  gates(alpha, num_alpha, temperature, width, mu, rest);

  const int status = tl_with_dtype(dtype, [&](auto element) {
    using S = decltype(element);
    const S *dz_data = static_cast<const S *>(dz), *s_data = static_cast<const S *>(s);
    const S *z_data = static_cast<const S *>(z);
    S *ds_data = static_cast<S *>(ds);
    parallel_for(chunks, threads, [&](int64_t chunk) {
      float *block = block_memory.data + chunk * 2 * width;
      double *chunk_sums = chunk_memory.data + chunk * 2 * width;
      const int64_t end = std::min(rows, (chunk + 1) * chunk_rows);
      for (int64_t i = chunk * chunk_rows; i < end; ++i) {
        if (ds != nullptr) scale_row(dz_data + i * dz_stride, mu, ds_data + i * width, width);
        if (!sums) continue;
        sum_row(dz_data + i * dz_stride, s_data + i * s_stride, z_data + i * z_stride, block, block + width, width);
        if (i % BLOCK_ROWS == BLOCK_ROWS - 1 || i == end - 1) flush(block, chunk_sums, 2 * width);
      }
    });
    return static_cast<int>(TL_OK);
  });
  if (status == TL_OK && sums)
    finish_sums(chunk_memory.data, chunks, mu, rest, width, num_alpha, temperature, dbias, dalpha);
  return status;
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_rung_forward_cpu,
             (const void *p, const void *s, const float *bias, const float *alpha, void *z, int64_t rows, int64_t width,
              int64_t num_alpha, int64_t p_stride, int64_t s_stride, int p_dtype, int s_dtype, float temperature,
              int threads),
             (p, s, bias, alpha, z, rows, width, num_alpha, p_stride, s_stride, p_dtype, s_dtype, temperature, threads))
TL_CPU_ENTRY(tl_rung_backward_cpu,
             (const void *dz, const void *s, const void *z, const float *alpha, void *ds, float *dbias, float *dalpha,
              int64_t rows, int64_t width, int64_t num_alpha, int64_t dz_stride, int64_t s_stride, int64_t z_stride,
              int dtype, float temperature, int threads),
             (dz, s, z, alpha, ds, dbias, dalpha, rows, width, num_alpha, dz_stride, s_stride, z_stride, dtype,
              temperature, threads))
