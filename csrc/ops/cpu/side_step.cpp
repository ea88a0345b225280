// One rung and one side block on one new position of each sequence: what a side network computes for a token while text
// is generated. All of it is a fraction of a million products, so the cost of calling a dozen operations would be
// several times that of computing them.
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"
#include "vec.h"

namespace TL_ISA {

struct Weights {
  const float *of[TL_STEP_WEIGHTS];
  explicit Weights(const int64_t *addresses) {
    for (int i = 0; i < TL_STEP_WEIGHTS; ++i) of[i] = reinterpret_cast<const float *>(addresses[i]);
  }
  const float *operator[](int i) const { return of[i]; }
};

static float dot(const float *a, const float *b, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Four outputs at once: their sums do not wait for each other.
static void four_dots(const float *__restrict x, const float *__restrict weight, float *__restrict y, int64_t inputs) {
  const float *w0 = weight, *w1 = w0 + inputs, *w2 = w1 + inputs, *w3 = w2 + inputs;
  float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < inputs; ++i) {
    s0 += x[i] * w0[i];
    s1 += x[i] * w1[i];
    s2 += x[i] * w2[i];
    s3 += x[i] * w3[i];
  }
  y[0] = s0;
  y[1] = s1;
  y[2] = s2;
  y[3] = s3;
}

// y (rows, outputs) = x (rows, inputs) weight^T + bias; a piece of the weight serves all rows while it is in the cache.
static void linear(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int64_t inputs,
                   int64_t outputs) {
  int64_t n = 0;
  for (; n + 4 <= outputs; n += 4)
    for (int64_t r = 0; r < rows; ++r) four_dots(x + r * inputs, weight + n * inputs, y + r * outputs + n, inputs);
  for (; n < outputs; ++n)
    for (int64_t r = 0; r < rows; ++r) y[r * outputs + n] = dot(x + r * inputs, weight + n * inputs, inputs);
  if (bias == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t j = 0; j < outputs; ++j) y[r * outputs + j] += bias[j];
  }
}

// LayerNorm, or RMSNorm where rms, of each row; y may be x.
static void normalise(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int64_t width,
                      bool rms, double eps) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *from = x + r * width;
    float *to = y + r * width, sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += from[j];
    const float centre = rms ? 0.0f : sum / static_cast<float>(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; ++j) squares += (from[j] - centre) * (from[j] - centre);
    const double variance = static_cast<double>(squares) / static_cast<double>(width);
    const float scale = static_cast<float>(1.0 / std::sqrt(variance + eps));
    if (bias == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) to[j] = (from[j] - centre) * scale * weight[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) to[j] = (from[j] - centre) * scale * weight[j] + bias[j];
    }
  }
}

static float activate(float x, int64_t kind) {
  switch (kind) {
    case TL_GELU:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case TL_GELU_TANH:
      return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case TL_QUICK_GELU:
      return x / (1.0f + std::exp(-1.702f * x));
    case TL_RELU:
      return x > 0.0f ? x : 0.0f;
    default:  // TL_SILU
      return x / (1.0f + std::exp(-x));
  }
}

// Rotates each head's first half against its second; cosines and sines (head_dim).
static void rotate(float *heads, int64_t count, int64_t head_dim, const float *cosines, const float *sines) {
  const int64_t half = head_dim / 2;
  for (int64_t h = 0; h < count; ++h) {
    float *x = heads + h * head_dim;
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[i + half];
      x[i] = first * cosines[i] - second * sines[i];
      x[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
  }
}

// One head of one sequence: its query against `past` cached keys and the new one. scores (past + 1) is working memory.
// A query that sees no key gives zeros.
static void attend(const float *query, const float *keys, const float *values, const float *new_key,
                   const float *new_value, const uint8_t *mask, const float *bias, float *scores, float *out,
                   int64_t past, int64_t head_dim, float scale) {
  float largest = -INFINITY;
  for (int64_t p = 0; p <= past; ++p) {
    const bool seen = mask == nullptr || mask[p] != 0;
    const float score = scale * dot(query, p < past ? keys + p * head_dim : new_key, head_dim);
    scores[p] = seen ? score + (bias == nullptr ? 0.0f : bias[p]) : -INFINITY;
    largest = scores[p] > largest ? scores[p] : largest;
  }
  std::memset(out, 0, sizeof(float) * head_dim);
  if (largest == -INFINITY) return;
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t p = 0; p <= past; ++p) {
    scores[p] = tl_expf(scores[p] - largest);
    total += scores[p];
  }
  for (int64_t p = 0; p <= past; ++p) {
    const float *value = p < past ? values + p * head_dim : new_value;
    const float share = scores[p] / total;
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i) out[i] += share * value[i];
  }
}

struct Step {
  int64_t batch, width, side_width, heads, kv_heads, head_dim, hidden, past, alphas, rotation_stride;
  int placement, rms, activation;
  double eps, scale, temperature;
  Weights weights;
  const float *tap, *s, *keys, *values;
  const uint8_t *key_mask;
  const float *bias, *cosines, *sines;
  float *new_keys, *new_values, *out;
};

static void add(const float *x, float *sum, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

// queries, keys and values (rows, heads + 2 kv_heads, head_dim) of new positions, and what the queries see.
static void attend_rows(const Step &step, float *qkv, float *scores, float *attended, int64_t first, int64_t rows) {
  const int64_t inner = step.heads * step.head_dim, kv = step.kv_heads * step.head_dim, keys = step.past + 1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = first + r;
    float *q = qkv + r * (inner + 2 * kv), *k = q + inner, *v = k + kv;
    if (step.weights[TL_STEP_QUERY_NORM] != nullptr) {
      normalise(q, step.weights[TL_STEP_QUERY_NORM], nullptr, q, step.heads, step.head_dim, true, step.eps);
      normalise(k, step.weights[TL_STEP_KEY_NORM], nullptr, k, step.kv_heads, step.head_dim, true, step.eps);
    }
    if (step.cosines != nullptr) {
      const int64_t at = b * step.rotation_stride;
      rotate(q, step.heads, step.head_dim, step.cosines + at, step.sines + at);
      rotate(k, step.kv_heads, step.head_dim, step.cosines + at, step.sines + at);
    }
    std::memcpy(step.new_keys + b * kv, k, sizeof(float) * kv);
    std::memcpy(step.new_values + b * kv, v, sizeof(float) * kv);
    for (int64_t h = 0; h < step.heads; ++h) {
      const int64_t group = h / (step.heads / step.kv_heads);
      const int64_t cached = (b * step.kv_heads + group) * step.past * step.head_dim;
      attend(q + h * step.head_dim, step.keys + cached, step.values + cached, k + group * step.head_dim,
             v + group * step.head_dim, step.key_mask == nullptr ? nullptr : step.key_mask + b * keys,
             step.bias == nullptr ? nullptr : step.bias + h * keys, scores, attended + r * inner + h * step.head_dim,
             step.past, step.head_dim, static_cast<float>(step.scale));
    }
  }
}

// What stands around one layer: norms before it, behind it, behind the residual sum, as the block's placement says.
static const float *before(const Step &step, const float *x, float *y, int norm, int64_t rows) {
  if (step.placement == TL_POST_NORM) return x;
  normalise(x, step.weights[norm], step.weights[norm + 1], y, rows, step.side_width, step.rms, step.eps);
  return y;
}

static void behind(const Step &step, float *y, float *x, int norm, int output_norm, int64_t rows) {
  if (step.weights[output_norm] != nullptr)
    normalise(y, step.weights[output_norm], nullptr, y, rows, step.side_width, step.rms, step.eps);
  add(y, x, rows * step.side_width);
  if (step.placement == TL_POST_NORM)
    normalise(x, step.weights[norm], step.weights[norm + 1], x, rows, step.side_width, step.rms, step.eps);
}

static void run_rows(const Step &step, float *memory, int64_t first, int64_t rows) {
  const Weights &w = step.weights;
  const int64_t width = step.side_width, inner = step.heads * step.head_dim;
  const int64_t qkv_width = inner + 2 * step.kv_heads * step.head_dim;
  const auto take = [&memory](int64_t count) { return (memory += count) - count; };
  float *y = take(rows * width), *qkv = take(rows * qkv_width), *attended = take(rows * inner);
  float *hidden = take(rows * step.hidden), *gate = take(rows * step.hidden), *scores = take(step.past + 1);
  float *x = step.out + first * width;

  linear(step.tap + first * step.width, w[TL_STEP_RUNG_WEIGHT], w[TL_STEP_RUNG_BIAS], y, rows, step.width, width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < width; ++j) {
      const float alpha = w[TL_STEP_ALPHA][step.alphas == 1 ? 0 : j];
      const float mu = 1.0f / (1.0f + std::exp(-alpha / static_cast<float>(step.temperature)));
      x[r * width + j] = mu * step.s[(first + r) * width + j] + (1.0f - mu) * y[r * width + j];
    }

  const float *read = before(step, x, y, TL_STEP_ATTENTION_NORM_WEIGHT, rows);
  linear(read, w[TL_STEP_QKV_WEIGHT], w[TL_STEP_QKV_BIAS], qkv, rows, width, qkv_width);
  attend_rows(step, qkv, scores, attended, first, rows);
  linear(attended, w[TL_STEP_OUTPUT_WEIGHT], w[TL_STEP_OUTPUT_BIAS], y, rows, inner, width);
  behind(step, y, x, TL_STEP_ATTENTION_NORM_WEIGHT, TL_STEP_ATTENTION_OUTPUT_NORM, rows);

  read = before(step, x, y, TL_STEP_FEED_FORWARD_NORM_WEIGHT, rows);
  linear(read, w[TL_STEP_UP_WEIGHT], w[TL_STEP_UP_BIAS], hidden, rows, width, step.hidden);
  if (w[TL_STEP_GATE_WEIGHT] == nullptr) {
    for (int64_t i = 0; i < rows * step.hidden; ++i) hidden[i] = activate(hidden[i], step.activation);
  } else {
    linear(read, w[TL_STEP_GATE_WEIGHT], w[TL_STEP_GATE_BIAS], gate, rows, width, step.hidden);
    for (int64_t i = 0; i < rows * step.hidden; ++i) hidden[i] *= activate(gate[i], step.activation);
  }
  linear(hidden, w[TL_STEP_DOWN_WEIGHT], w[TL_STEP_DOWN_BIAS], y, rows, step.hidden, width);
  behind(step, y, x, TL_STEP_FEED_FORWARD_NORM_WEIGHT, TL_STEP_FEED_FORWARD_OUTPUT_NORM, rows);
}

int tl_side_step_cpu(const int64_t *weights, const float *tap, const float *s, const float *keys, const float *values,
                     const uint8_t *key_mask, const float *bias, const float *cosines, const float *sines,
                     float *new_keys, float *new_values, float *out, int64_t batch, int64_t width, int64_t side_width,
                     int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t hidden, int64_t past, int64_t alphas,
                     int64_t rotation_stride, int placement, int rms, int activation, double eps, double scale,
                     double temperature, int threads) {
  if (batch == 0) return TL_OK;
  const Step step = {batch,    width,     side_width, heads,      kv_heads,   head_dim, hidden,
                     past,     alphas,    rotation_stride, placement, rms,    activation, eps,
                     scale,    temperature, Weights(weights), tap, s,         keys,     values,
                     key_mask, bias,      cosines,    sines,      new_keys,   new_values, out};
  // Rows do not depend on each other: each thread takes its own through the whole block, without a barrier.
  const int64_t chunks = batch < threads ? batch : threads, chunk_rows = (batch + chunks - 1) / chunks;
  const int64_t each =
      chunk_rows * (side_width + 2 * heads * head_dim + 2 * kv_heads * head_dim + 2 * hidden) + past + 1;
  Scratch memory(chunks * each);
  if (memory.data == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "side_step: no memory for %lld numbers", static_cast<long long>(chunks * each));
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t first = chunk * chunk_rows, left = batch - first;
    if (left > 0) run_rows(step, memory.data + chunk * each, first, left < chunk_rows ? left : chunk_rows);
  });
  return TL_OK;
}

}  // namespace TL_ISA

#define PARAMETERS                                                                                                    \
  (const int64_t *weights, const float *tap, const float *s, const float *keys, const float *values,                 \
   const uint8_t *key_mask, const float *bias, const float *cosines, const float *sines, float *new_keys,            \
   float *new_values, float *out, int64_t batch, int64_t width, int64_t side_width, int64_t heads, int64_t kv_heads, \
   int64_t head_dim, int64_t hidden, int64_t past, int64_t alphas, int64_t rotation_stride, int placement, int rms,  \
   int activation, double eps, double scale, double temperature, int threads)
TL_CPU_ENTRY(tl_side_step_cpu, PARAMETERS,
             (weights, tap, s, keys, values, key_mask, bias, cosines, sines, new_keys, new_values, out, batch, width,
              side_width, heads, kv_heads, head_dim, hidden, past, alphas, rotation_stride, placement, rms, activation,
              eps, scale, temperature, threads))
