// The whole C ABI of tlfast's native library. It knows nothing of torch, so one build serves every torch version.
//
// Conventions, the same for every operation:
//   * pointers come first, then int64 sizes, then int64 strides counted in elements, then scalars;
//   * a dtype is one of the tl_dtype codes; a null pointer means "argument absent";
//   * CPU functions end with `threads`, the size of the team to use (callers pass torch's own number);
//   * CUDA functions end with `stream`, a cudaStream_t; they launch and return without synchronising;
//   * every function returns a tl_status; on anything but TL_OK, tl_last_error() describes it (per thread).
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum tl_status { TL_OK = 0, TL_BAD_ARGUMENT = 1, TL_CUDA_ERROR = 2, TL_OUT_OF_MEMORY = 3 };

enum tl_dtype { TL_F32 = 0, TL_F16 = 1, TL_BF16 = 2 };

const char *tl_last_error(void);

// Instruction set the CPU kernels use on this machine: "x86-64", "x86-64-v3" (AVX2), "x86-64-v4" (AVX-512), "generic".
const char *tl_cpu_isa(void);

// What the CPU kernels multiply matrices in bfloat16 and int8 with: "AMX", "AVX-512 VNNI and BF16", "AVX-512", "AVX2", "none".
const char *tl_matrix_isa(void);

// GPU architectures compiled in, such as "80,90,100"; empty when built without CUDA.
const char *tl_cuda_architectures(void);

// Who runs the CPU kernels' threads: "OpenMP pool of this process" or "own threads".
const char *tl_thread_pool(void);

// rung, forward:  z = mu*s + (1-mu)*(p + bias),  mu = sigmoid(alpha/temperature).
//   p (rows, width) row stride p_stride, dtype p_dtype; s and z (rows, width), dtype s_dtype, row strides s_stride and
//   width; z may be p itself when the dtypes agree and p_stride == width. bias (width) and alpha (num_alpha: 1 or width) are fp32; bias may be null.
int tl_rung_forward_cpu(const void *p, const void *s, const float *bias, const float *alpha, void *z, int64_t rows,
                        int64_t width, int64_t num_alpha, int64_t p_stride, int64_t s_stride, int p_dtype, int s_dtype,
                        float temperature, int threads);

// rung, backward, the memory-bound part in one pass over dz, s and z:
//   ds = mu*dz;  dbias = (1-mu)*sum_rows dz;  dalpha = mu/temperature * sum dz*(s-z)  (over the channels too if num_alpha == 1).
//   dz, s, z have dtype `dtype` and row strides; ds (rows, width) is contiguous in the same dtype and may be null, as may
//   dbias (width, fp32) and dalpha (num_alpha, fp32).
int tl_rung_backward_cpu(const void *dz, const void *s, const void *z, const float *alpha, void *ds, float *dbias,
                         float *dalpha, int64_t rows, int64_t width, int64_t num_alpha, int64_t dz_stride,
                         int64_t s_stride, int64_t z_stride, int dtype, float temperature, int threads);

// attention, forward:  out = dropout(softmax(scale q k^T + bias)) v a head.
//   q (batch, queries, heads, head_dim), k and v (batch, keys, heads, head_dim) with strides for batch, row and head,
//   the last dimension contiguous; out like q but contiguous; all of dtype `dtype`. statistics (batch, heads, queries,
//   2) fp32: a row's largest score and 1/sum of exponentials; 0 and 0 for a query that sees no key, whose row of out is
//   0. bias fp32 with strides for batch, head and query (0 broadcasts), keys contiguous, or null. key_mask (batch,
//   keys) bytes, non-zero = attend, or null. causal != 0: query i sees the keys j <= i + keys - queries. dropout_p in
//   [0, 1); the mask is that of common/dropout.h at row (b heads + h) queries + i, column j.
int tl_attention_forward_cpu(const void *q, const void *k, const void *v, const float *bias, const uint8_t *key_mask,
                             void *out, float *statistics, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                             int64_t head_dim, int64_t q_batch, int64_t q_row, int64_t q_head, int64_t k_batch,
                             int64_t k_row, int64_t k_head, int64_t v_batch, int64_t v_row, int64_t v_head,
                             int64_t bias_batch, int64_t bias_head, int64_t bias_row, int dtype, int causal,
                             double scale, double dropout_p, uint64_t seed, int threads);

// attention, backward: recomputes the probabilities from the statistics, one tile at a time.
//   dout and out are contiguous like dq, dk, dv, which are written in full. dbias (dbias_batch, heads, queries, keys)
//   fp32, contiguous, must come zeroed; dbias_batch 1 sums over the batch; null where not wanted.
int tl_attention_backward_cpu(const void *dout, const void *q, const void *k, const void *v, const float *bias,
                              const uint8_t *key_mask, const void *out, const float *statistics, void *dq, void *dk,
                              void *dv, float *dbias, int64_t dbias_batch, int64_t batch, int64_t heads,
                              int64_t queries, int64_t keys, int64_t head_dim, int64_t q_batch, int64_t q_row,
                              int64_t q_head, int64_t k_batch, int64_t k_row, int64_t k_head, int64_t v_batch,
                              int64_t v_row, int64_t v_head, int64_t bias_batch, int64_t bias_head, int64_t bias_row,
                              int dtype, int causal, double scale, double dropout_p, uint64_t seed, int threads);

// add_norm and prenorm, forward:  u = residual + dropout(x),  y = (u - mean) rstd weight + bias over the last dimension.
//   x and residual (rows, width) with row strides; u and y contiguous; mean and rstd (rows); all fp32; bias may be null.
//   mean null: RMSNorm instead of LayerNorm, y = u rstd weight + bias with rstd from the mean square.
int tl_add_norm_forward_cpu(const float *x, const float *residual, const float *weight, const float *bias, float *u,
                            float *y, float *mean, float *rstd, int64_t rows, int64_t width, int64_t x_stride,
                            int64_t residual_stride, double eps, double dropout_p, uint64_t seed, int threads);

// add_norm and prenorm, backward; mean null as in the forward. du, the gradient of u as an output, may be null. dx null
//   where dropout_p is 0: it equals dresidual. dbias may be null. Outputs are contiguous.
int tl_add_norm_backward_cpu(const float *du, const float *dy, const float *u, const float *mean, const float *rstd,
                             const float *weight, float *dx, float *dresidual, float *dweight, float *dbias,
                             int64_t rows, int64_t width, int64_t du_stride, int64_t dy_stride, double dropout_p,
                             uint64_t seed, int threads);

// dropout_add, forward:  z = residual + dropout(x);  backward: dx = dropout(dz) with the same mask, dresidual = dz.
//   x, residual and dz (rows, width) with row strides; z and dx contiguous; all fp32; p in [0, 1).
int tl_dropout_add_forward_cpu(const float *x, const float *residual, float *z, int64_t rows, int64_t width,
                               int64_t x_stride, int64_t residual_stride, double p, uint64_t seed, int threads);
int tl_dropout_add_backward_cpu(const float *dz, float *dx, int64_t rows, int64_t width, int64_t dz_stride, double p,
                                uint64_t seed, int threads);

// norm_tap:  total = x + residual,  y = (total - mean) / sqrt(variance + eps) * weight + bias over the last dimension, from
//   the unrounded sum; rms != 0: y = total / sqrt(mean square + eps) * weight + bias.
//   x and residual (rows, width) with row strides; total and y contiguous; all of dtype `dtype`. total may be null; residual null: total is
//   x, and null. weight and bias (width) fp32, either may be null. values (rows, width) and scale (rows): y quantised as
//   quantise_rows does, or both null.
int tl_norm_tap_cpu(const void *x, const void *residual, const float *weight, const float *bias, void *total, void *y,
                    int8_t *values, float *scale, int64_t rows, int64_t width, int64_t x_stride,
                    int64_t residual_stride, int dtype, int rms, double eps, int threads);

// quantise_rows:  scale = max |x smooth| / 127 of a row,  values = x smooth / scale, rounded to nearest even.
//   x (rows, width) of dtype `dtype` with a row stride; smooth (width) fp32 or null; values contiguous, scale (rows) fp32.
//   Values are 0 where scale is 0, infinite or NaN; a scale below the smallest normal number is 0.
int tl_quantise_rows_cpu(const void *x, const float *smooth, int8_t *values, float *scale, int64_t rows, int64_t width,
                         int64_t x_stride, int dtype, int threads);

// The weights of a rung and a side block, in the order in which side_step takes their addresses; 0 where one is absent.
enum tl_step_weight {
  TL_STEP_RUNG_WEIGHT,
  TL_STEP_RUNG_BIAS,
  TL_STEP_ALPHA,
  TL_STEP_ATTENTION_NORM_WEIGHT,
  TL_STEP_ATTENTION_NORM_BIAS,
  TL_STEP_QKV_WEIGHT,
  TL_STEP_QKV_BIAS,
  TL_STEP_QUERY_NORM,
  TL_STEP_KEY_NORM,
  TL_STEP_OUTPUT_WEIGHT,
  TL_STEP_OUTPUT_BIAS,
  TL_STEP_ATTENTION_OUTPUT_NORM,
  TL_STEP_FEED_FORWARD_NORM_WEIGHT,
  TL_STEP_FEED_FORWARD_NORM_BIAS,
  TL_STEP_UP_WEIGHT,
  TL_STEP_UP_BIAS,
  TL_STEP_GATE_WEIGHT,
  TL_STEP_GATE_BIAS,
  TL_STEP_DOWN_WEIGHT,
  TL_STEP_DOWN_BIAS,
  TL_STEP_FEED_FORWARD_OUTPUT_NORM,
  TL_STEP_WEIGHTS
};

enum tl_placement { TL_POST_NORM = 0, TL_PRE_NORM = 1 };  // with output norms given, both: a sandwich
enum tl_activation { TL_GELU = 0, TL_GELU_TANH = 1, TL_QUICK_GELU = 2, TL_RELU = 3, TL_SILU = 4, TL_NO_ACTIVATION = 5 };

// side_step: one new position of each sequence through a rung and a side block; everything contiguous fp32.
//   tap (batch, width), s and out (batch, side_width); keys and values (batch, kv_heads, past, head_dim); new_keys and
//   new_values (batch, kv_heads, head_dim) are written; key_mask (batch, past + 1) or null; bias (heads, past + 1) or
//   null; cosines and sines (1 or batch, head_dim) or null, rotation_stride 0 or head_dim.
int tl_side_step_cpu(const int64_t *weights, const float *tap, const float *s, const float *keys, const float *values,
                     const uint8_t *key_mask, const float *bias, const float *cosines, const float *sines,
                     float *new_keys, float *new_values, float *out, int64_t batch, int64_t width, int64_t side_width,
                     int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t hidden, int64_t past, int64_t alphas,
                     int64_t rotation_stride, int placement, int rms, int activation, double eps, double scale,
                     double temperature, int threads);

// The weights of a side block, in the order in which side_block takes their addresses; 0 where one is absent. Matrices are
// (outputs, inputs), contiguous.
enum tl_block_weight {
  TL_BLOCK_ATTENTION_NORM_WEIGHT,
  TL_BLOCK_ATTENTION_NORM_BIAS,
  TL_BLOCK_QKV_WEIGHT,
  TL_BLOCK_QKV_BIAS,
  TL_BLOCK_OUTPUT_WEIGHT,
  TL_BLOCK_OUTPUT_BIAS,
  TL_BLOCK_FEED_FORWARD_NORM_WEIGHT,
  TL_BLOCK_FEED_FORWARD_NORM_BIAS,
  TL_BLOCK_UP_WEIGHT,
  TL_BLOCK_UP_BIAS,
  TL_BLOCK_DOWN_WEIGHT,
  TL_BLOCK_DOWN_BIAS,
  TL_BLOCK_WEIGHTS
};

struct tl_side_block {
  int64_t batch, length, width, heads, head_dim, hidden;
  int64_t placement, rms, activation, causal;  // as side_step takes them
  int64_t rounded;                             // not 0: products take their operands in bfloat16
  double eps, scale, attention_dropout, hidden_dropout;
  uint64_t attention_seed, output_seed, feed_forward_seed;
};

// side_block, forward and backward: a transformer block, self-attention and a feed-forward.
//   x, out, dout and dx (batch, length, width) contiguous fp32; key_mask (batch, length) bytes, non-zero = a token, or
//   null. Rows behind a sequence's last token are skipped: out and dx are 0 there, dout is not read. The backward
//   recomputes the forward from x, but for the attention and, where norms stand behind the layers, the last sum: kept
//   (batch, length, heads head_dim [+ width]) has the heads' output and that sum, statistics (batch, heads, length, 2) two
//   numbers a row of the attention; both without rows that were skipped. gradients: an address for each weight, written in full.
int tl_side_block_forward_cpu(const struct tl_side_block *block, const int64_t *weights, const float *x,
                              const uint8_t *key_mask, float *out, float *kept, float *statistics, int threads);
int tl_side_block_backward_cpu(const struct tl_side_block *block, const int64_t *weights, const float *x,
                               const uint8_t *key_mask, const float *kept, const float *statistics,
                               const float *dout, float *dx, const int64_t *gradients, int threads);

enum tl_weight_format {
  TL_WEIGHT_BF16 = 0,
  TL_WEIGHT_INT8 = 1,
  TL_WEIGHT_NF4 = 2,
  TL_WEIGHT_INT8_ONLY = 3,
  TL_WEIGHT_FP32 = 4,  // a struct tl_shared_weight
};

// A weight in float32 where the model has it: up to three parts of the same inputs, number (n, k) of a part lying at
// n row_stride + k column_stride. Their outputs lie side by side, each filled up to a whole panel of 32; or, gated, the
// first two parts' take turns of 16.
struct tl_shared_weight {
  const float *parts[3];
  int64_t outputs[3];  // 0 where there is no part
  int64_t row_stride, column_stride;
};

// linear, frozen:  y = activation(x W^T + bias),  or activation(gates) * rest of each panel where gated is not 0.
//   x (rows, inputs) with row stride, dtype x_dtype; y (rows, outputs, or outputs / 2 where gated), dtype y_dtype.
//   weight: panels of 32 outputs of right tiles (common/matrix.h), [panel][step][2 tiles][16 groups][16 outputs][2 bf16 or
//   4 int8 numbers], padded with zeros; of nf4 one byte for 2 numbers, the first in the low half. scale: one fp32 an
//   output, padded to whole panels (int8, nf4); group_scale: [panel][64 inputs][32 outputs] bytes, in 255ths of scale (nf4).
//   smooth (inputs) multiplies x, or null; bias fp32 (outputs padded to whole panels), or null. int8 quantises each row of
//   x with its own scale; int8-only is stored alike but multiplies in bf16.
int tl_linear_cpu(const void *x, const void *weight, const float *scale, const uint8_t *group_scale,
                  const float *smooth, const float *bias, void *y, int64_t rows, int64_t inputs, int64_t outputs,
                  int64_t x_stride, int64_t y_stride, int x_dtype, int y_dtype, int format, int activation, int gated,
                  int threads);

// The same in float32, on AVX-512 and AMX; outputs counts those that fill up a panel between two parts.
int tl_linear_fp32_cpu(const float *x, const struct tl_shared_weight *weight, const float *bias, float *y, int64_t rows,
                       int64_t inputs, int64_t outputs, int64_t x_stride, int64_t y_stride, int activation, int gated,
                       int threads);

// packed_attention:  out = softmax(scale q k^T + bias) v a head, for sequences packed one behind the other.
//   q (tokens, heads, head_dim), k and v (tokens of keys, kv_heads, head_dim) with strides for row and head, the last
//   dimension contiguous; out like q but contiguous; all of dtype `dtype`; heads a multiple of kv_heads. Sequence b has
//   queries starts[b] to starts[b + 1] and keys starts_k[b] to starts_k[b + 1]. bias fp32 (heads, longest, longest of
//   keys) with strides, keys contiguous, or null. cosines and sines fp32 (tokens, head_dim), contiguous, rotate q and k
//   (head_dim even), or null. window: the farthest key on either side that a query sees; < 0: any. causal != 0: query i
//   sees the keys j <= i + keys - queries. A query that sees no key gives zeros.
int tl_packed_attention_cpu(const void *q, const void *k, const void *v, const int32_t *starts, const int32_t *starts_k,
                            const float *bias, const float *cosines, const float *sines, void *out, int64_t batch,
                            int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t q_row, int64_t q_head,
                            int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, int64_t bias_head,
                            int64_t bias_row, int64_t window, int dtype, int causal, double scale, int threads);

// A linear layer as linear_cpu takes it, and a norm; all pointers but `weight` may be null.
struct tl_linear {
  const void *weight;
  const float *scale;
  const uint8_t *group_scale;
  const float *smooth, *bias;
  int64_t inputs, outputs, format, gated;
};
struct tl_norm {
  const float *weight, *bias;
  double eps;
};
struct tl_block {
  struct tl_linear qkv, output, up, down;
  struct tl_norm attention_norm, feed_forward_norm;
  int64_t window;  // as packed_attention takes it
};

// packed_blocks: `count` blocks of a transformer over packed sequences, to the bit what linear, packed_attention and
//   norm_tap give one after the other. x (tokens, width) contiguous in dtype bf16, or fp32 where all weights are;
//   final_norm null: none. outputs: the address of each block's output like x, null where it is not wanted, then that of
//   the last hidden state, which is the last block's output where there is no final norm. Of a row of qkv, k begins at
//   k_offset and v at v_offset.
int tl_packed_blocks_cpu(const void *x, const struct tl_block *blocks, const struct tl_norm *final_norm,
                         const int32_t *starts, const float *bias, const float *cosines, const float *sines,
                         void *const *outputs, int64_t sequences, int64_t count, int64_t width, int64_t heads,
                         int64_t kv_heads, int64_t head_dim, int64_t k_offset, int64_t v_offset, int64_t bias_head,
                         int64_t bias_row, int dtype, int placement, int rms, int activation, int causal, double scale,
                         int threads);

// contrastive: a tile of products u_i . v_j, (rows, columns) fp32 with row stride `stride`, is worked on in place. s = scale
//   product. Row i's own pair is the column i + diagonal where that is in the tile; it is left out of sums over the others.
// softmax, forward: adds a tile to the running maximum and sum of exp(s - maximum) of its rows and of its columns, which
//   start as -inf and 0, and writes own (rows), the own pairs' s.
int tl_contrastive_softmax_forward_cpu(float *tile, float *row_maximum, float *row_sum, float *column_maximum,
                                       float *column_sum, float *own, int64_t rows, int64_t columns, int64_t stride,
                                       int64_t diagonal, double scale, int threads);
// softmax, backward: tile = row_weight exp(s - row_lse) + column_weight exp(s - column_lse), own_weight for own pairs.
int tl_contrastive_softmax_backward_cpu(float *tile, const float *row_lse, const float *row_weight,
                                        const float *column_lse, const float *column_weight, const float *own_weight,
                                        int64_t rows, int64_t columns, int64_t stride, int64_t diagonal, double scale,
                                        int threads);
// sigmoid, forward: adds each row's sums of softplus(s + bias) and sigmoid(s + bias), which start as 0; writes own.
int tl_contrastive_sigmoid_forward_cpu(float *tile, float *row_softplus, float *row_sigmoid, float *own, int64_t rows,
                                       int64_t columns, int64_t stride, int64_t diagonal, double scale, double bias,
                                       int threads);
// sigmoid, backward: tile = row_weight sigmoid(s + bias), own_weight for own pairs.
int tl_contrastive_sigmoid_backward_cpu(float *tile, const float *row_weight, const float *own_weight, int64_t rows,
                                        int64_t columns, int64_t stride, int64_t diagonal, double scale, double bias,
                                        int threads);

// One relation's part of hetero_aggregate: the rows of x (row stride x_stride) that a target's edges name. Target v has the
//   sources col[rowptr[v]] to col[rowptr[v + 1]]; row_scale (targets) and col_scale (sources) fp32, or null for 1.
typedef struct {
  const void *x;
  const int32_t *rowptr, *col;
  const float *row_scale, *col_scale;
  int64_t x_stride;
} tl_gather;

// hetero_aggregate:  y[v] = base[v] + sum over relations of row_scale[v] * sum over edges of col_scale[u] * x[u],  and
//   max(y, 0) where relu is not 0. x, base and y (rows, width) with row strides, of dtype `dtype`, fp32 or bf16; base may
//   be null, or y itself. tasks (num_tasks, 3): first row, row after the last, and quarter of the columns (-1: all).
int tl_hetero_aggregate_cpu(const tl_gather *relations, const void *base, void *y, const int32_t *tasks,
                            int64_t num_tasks, int64_t num_relations, int64_t width, int64_t base_stride,
                            int64_t y_stride, int dtype, int relu, int threads);

// product:  y = x w^T, or y += x w^T where accumulate is not 0. In float32 with row strides, on AMX alone: x (rows, inputs),
//   w (outputs, inputs), y (rows, outputs). Errors are those of float32 sums; the same bits for any `threads`.
int tl_product_fp32_cpu(const float *x, const float *w, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                        int64_t x_stride, int64_t w_stride, int64_t y_stride, int accumulate, int threads);

// One relation to sample from: target v has the sources col[rowptr[v]] to col[rowptr[v + 1]]. source and target number the
//   node types.
typedef struct {
  const int32_t *rowptr, *col;
  int64_t source, target;
} tl_sampled_relation;

// sample_neighbours: from the seeds, hop by hop, edges into the nodes that were found last: of each node and relation r all
//   where fan_outs[hop][r] < 0, else so many, with or without replacement (without: at most all). seeds: of each type
//   num_seeds[type] different nodes, one type behind the other. counts: nodes (types, hops + 1) and then edges
//   (relations, hops + 1) that were found within so many hops. The result is the same for any `threads`; it waits in
//   `handle` until sample_take has it.
int tl_sample_neighbours_cpu(const tl_sampled_relation *relations, const int64_t *seeds, const int64_t *num_seeds,
                             const int64_t *fan_outs, int64_t *counts, void **handle, int64_t num_types,
                             int64_t num_relations, int64_t hops, uint64_t seed, int replace, int threads);
// Writes what was sampled, one type and one relation behind the other, and gives the handle back: nodes in the order in
//   which they were found; of a relation rowptr over all nodes of targets[relation] and col, places among the nodes of its
//   source, ascending in a row. nodes null: no nodes; rowptr null: no rows.
int tl_sample_take_cpu(void *handle, const int64_t *targets, int64_t *nodes, int32_t *rowptr, int32_t *col);

// Compressed rows and where their transpose goes, with 1 / edges of each row of both, 0 for rows without.
typedef struct {
  const int32_t *rowptr, *col;
  int32_t *transposed_rowptr, *transposed_col;
  float *inverse, *transposed_inverse;
  int64_t rows, columns;
} tl_rows;

// transpose_rows: of each of the relations. Columns come out ascending in a row.
int tl_transpose_rows_cpu(const tl_rows *relations, int64_t num_relations, int threads);

#ifdef TLFAST_WITH_CUDA
// As on the CPU. In the backward dbias and dalpha are accumulated into and must come zeroed.
int tl_rung_forward_cuda(const void *p, const void *s, const float *bias, const float *alpha, void *z, int64_t rows,
                         int64_t width, int64_t num_alpha, int64_t p_stride, int64_t s_stride, int p_dtype, int s_dtype,
                         float temperature, void *stream);
int tl_rung_backward_cuda(const void *dz, const void *s, const void *z, const float *alpha, void *ds, double *dbias,
                          double *dalpha, int64_t rows, int64_t width, int64_t num_alpha, int64_t dz_stride,
                          int64_t s_stride, int64_t z_stride, int dtype, float temperature, void *stream);
// `relations` itself lies on the host, what it points to on the device.
int tl_hetero_aggregate_cuda(const tl_gather *relations, const void *base, void *y, const int32_t *tasks,
                             int64_t num_tasks, int64_t num_relations, int64_t width, int64_t base_stride,
                             int64_t y_stride, int dtype, int relu, void *stream);
#endif

#ifdef __cplusplus
}
#endif
