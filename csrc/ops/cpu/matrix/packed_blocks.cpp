// Blocks of a frozen transformer over packed sequences: a thread takes a few sequences through all blocks, so that what
// lies between two operations stays in its cache and threads never wait for each other.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "dtype.h"
#include "isa.h"
#include "linear_pair.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"

namespace TL_ISA {

int tl_linear_cpu(const void *x, const void *weight, const float *scale, const uint8_t *group_scale,
                  const float *smooth, const float *bias, void *y, int64_t rows, int64_t inputs, int64_t outputs,
                  int64_t x_stride, int64_t y_stride, int x_dtype, int y_dtype, int format, int activation, int gated,
                  int threads);
int tl_linear_fp32_cpu(const float *x, const tl_shared_weight *weight, const float *bias, float *y, int64_t rows,
                       int64_t inputs, int64_t outputs, int64_t x_stride, int64_t y_stride, int activation, int gated,
                       int threads);
int tl_norm_tap_cpu(const void *x, const void *residual, const float *weight, const float *bias, void *total, void *y,
                    int8_t *values, float *scale, int64_t rows, int64_t width, int64_t x_stride,
                    int64_t residual_stride, int dtype, int rms, double eps, int threads);
int tl_packed_attention_cpu(const void *q, const void *k, const void *v, const int32_t *starts, const int32_t *starts_k,
                            const float *bias, const float *cosines, const float *sines, void *out, int64_t batch,
                            int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t q_row, int64_t q_head,
                            int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, int64_t bias_head,
                            int64_t bias_row, int64_t window, int dtype, int causal, double scale, int threads);

// Tokens that go through the blocks together: enough that reading the weights costs little, few enough that their
// activations fit the L2 cache beside a group of panels. float32's weights are laid out anew for each.
static constexpr int64_t CHUNK_TOKENS = 256, FP32_CHUNK_TOKENS = 1024;

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Blocks {
  const uint8_t *x;
  const tl_block *blocks;
  const tl_norm *final_norm;
  const int32_t *starts;
  const float *bias, *cosines, *sines;
  uint8_t *const *outputs;  // one a block, null where it is not tapped; then the last hidden state
  int64_t sequences, count, width, heads, kv_heads, head_dim, k_offset, v_offset, bias_head, bias_row;
  int dtype, placement, rms, activation, causal;
  double scale;

  int64_t number() const { return dtype == TL_F32 ? sizeof(float) : sizeof(tl_bf16); }
};

// What some tokens go through on `threads` threads; rows are contiguous.
class Chunk {
 public:
  Chunk(const Blocks &all, int64_t first_sequence, int64_t last_sequence, int threads)
      : all_(all), first_sequence_(first_sequence), sequences_(last_sequence - first_sequence),
        first_(all.starts[first_sequence]), tokens_(all.starts[last_sequence] - first_), number_(all.number()),
        threads_(threads) {}

  int run() {
    if (tokens_ == 0) return TL_OK;
    int64_t widest = 0;
    for (int64_t b = 0; b < all_.count; ++b)
      widest = std::max({widest, all_.blocks[b].qkv.outputs, width_of(all_.blocks[b].up)});
    const int64_t row = round_up(all_.width * number_, 64), wide_row = round_up(widest * number_, 64);
    const int64_t heads_row = round_up(all_.heads * all_.head_dim * number_, 64);
    uint8_t *memory = kept_scratch<4>(tokens_ * (4 * row + heads_row) + round_up(tokens_, 16) * wide_row + 64);
    if (memory == nullptr)
      return tl_fail(TL_OUT_OF_MEMORY, "no memory for the activations of %lld tokens", (long long)tokens_);
    const auto take = [&](int64_t bytes) { return (memory += bytes) - bytes; };
    change_ = take(tokens_ * row), middle_ = take(tokens_ * row), normed_ = take(tokens_ * row), own_ = take(tokens_ * row);
    attended_ = take(tokens_ * heads_row), wide_ = take(round_up(tokens_, 16) * wide_row);
    return all_.placement == TL_PRE_NORM ? pre_norm() : post_norm();
  }

 private:
  int post_norm() {
    const uint8_t *x = at(all_.x);
    for (int64_t b = 0; b < all_.count; ++b) {
      const tl_block &block = all_.blocks[b];
      uint8_t *out = output(b);
      if (int status = attend(block, x)) return status;
      if (int status = norm(block.attention_norm, change_, x, nullptr, middle_)) return status;
      if (int status = feed_forward(block, middle_)) return status;
      if (int status = norm(block.feed_forward_norm, change_, middle_, nullptr, out)) return status;
      x = out;
    }
    return TL_OK;
  }

  int pre_norm() {
    const uint8_t *x = at(all_.x);
    if (int status = norm(all_.blocks[0].attention_norm, x, nullptr, nullptr, normed_)) return status;
    for (int64_t b = 0; b < all_.count; ++b) {
      const tl_block &block = all_.blocks[b];
      const bool last = b + 1 == all_.count;
      const tl_norm *after = last ? all_.final_norm : &all_.blocks[b + 1].attention_norm;
      uint8_t *out = output(b), *normed = last && after != nullptr ? at(all_.outputs[all_.count]) : normed_;
      if (int status = attend(block, normed_)) return status;
      if (int status = norm(block.feed_forward_norm, change_, x, middle_, normed_)) return status;
      if (int status = feed_forward(block, normed_)) return status;
      // without a norm behind them the sum alone is kept
      if (int status = norm(after == nullptr ? block.feed_forward_norm : *after, change_, middle_, out, normed))
        return status;
      x = out;
    }
    return TL_OK;
  }

  template <class T>
  T *at(T *rows) const { return rows + first_ * all_.width * number_; }
  uint8_t *output(int64_t b) const {
    if (all_.outputs[b] != nullptr) return at(all_.outputs[b]);
    const bool last_hidden_state = b + 1 == all_.count && all_.final_norm == nullptr;
    return last_hidden_state ? at(all_.outputs[all_.count]) : own_;
  }

  static int64_t width_of(const tl_linear &layer) { return layer.gated ? layer.outputs / 2 : layer.outputs; }

  int norm(const tl_norm &norm, const uint8_t *x, const uint8_t *residual, uint8_t *total, uint8_t *y) const {
    return tl_norm_tap_cpu(x, residual, norm.weight, norm.bias, total, y, nullptr, nullptr, tokens_, all_.width,
                           all_.width, all_.width, all_.dtype, all_.rms, norm.eps, threads_);
  }

  int linear(const tl_linear &layer, const uint8_t *x, uint8_t *y, int activation) const {
    if (layer.format == TL_WEIGHT_FP32)
      return TL_ISA::tl_linear_fp32_cpu(reinterpret_cast<const float *>(x),
                                static_cast<const tl_shared_weight *>(layer.weight), layer.bias,
                                reinterpret_cast<float *>(y), tokens_, layer.inputs, layer.outputs, layer.inputs,
                                width_of(layer), activation, layer.gated != 0, threads_);
    return tl_linear_cpu(x, layer.weight, layer.scale, layer.group_scale, layer.smooth, layer.bias, y, tokens_,
                         layer.inputs, layer.outputs, layer.inputs, width_of(layer), all_.dtype, all_.dtype,
                         static_cast<int>(layer.format), activation, layer.gated != 0, threads_);
  }

  // change = attention(x)
  int attend(const tl_block &block, const uint8_t *x) const {
    if (int status = linear(block.qkv, x, wide_, TL_NO_ACTIVATION)) return status;
    const int64_t row = block.qkv.outputs, hd = all_.head_dim;
    // the offsets count from the first of all sequences
    const uint8_t *q = wide_ - first_ * row * number_;
    uint8_t *out = attended_ - first_ * all_.heads * hd * number_;
    const int32_t *starts = all_.starts + first_sequence_;
    if (int status = tl_packed_attention_cpu(
            q, q + all_.k_offset * number_, q + all_.v_offset * number_, starts, starts, all_.bias, all_.cosines,
            all_.sines, out, sequences_, all_.heads, all_.kv_heads, hd, row, hd, row, hd, row, hd, all_.bias_head,
            all_.bias_row, block.window, all_.dtype, all_.causal, all_.scale, threads_))
      return status;
    return linear(block.output, attended_, change_, TL_NO_ACTIVATION);
  }

  // change = feed_forward(x)
  int feed_forward(const tl_block &block, const uint8_t *x) const {
    if (all_.dtype == TL_BF16)
      return linear_pair(block.up, block.down, x, wide_, change_, tokens_, all_.activation, threads_);
    if (int status = linear(block.up, x, wide_, all_.activation)) return status;
    return linear(block.down, wide_, change_, TL_NO_ACTIVATION);
  }

  const Blocks &all_;
  int64_t first_sequence_, sequences_, first_, tokens_, number_;
  int threads_;
  uint8_t *change_ = nullptr, *middle_ = nullptr, *normed_ = nullptr, *own_ = nullptr, *attended_ = nullptr;
  uint8_t *wide_ = nullptr;
};

int tl_packed_blocks_cpu(const void *x, const tl_block *blocks, const tl_norm *final_norm, const int32_t *starts,
                         const float *bias, const float *cosines, const float *sines, void *const *outputs,
                         int64_t sequences, int64_t count, int64_t width, int64_t heads, int64_t kv_heads,
                         int64_t head_dim, int64_t k_offset, int64_t v_offset, int64_t bias_head, int64_t bias_row,
                         int dtype, int placement, int rms, int activation, int causal, double scale, int threads) {
  if (dtype != TL_BF16 && dtype != TL_F32)
    return tl_fail(TL_BAD_ARGUMENT, "packed_blocks: dtype code %d is neither bfloat16 nor float32", dtype);
  const Blocks all = {static_cast<const uint8_t *>(x), blocks, final_norm, starts, bias, cosines, sines,
                      reinterpret_cast<uint8_t *const *>(outputs), sequences, count, width, heads, kv_heads, head_dim,
                      k_offset, v_offset, bias_head, bias_row, dtype, placement, rms, activation, causal, scale};
  const int64_t tokens = starts[sequences], at_once = dtype == TL_F32 ? FP32_CHUNK_TOKENS : CHUNK_TOKENS;
  int64_t longest = 0;
  for (int64_t s = 0; s < sequences; ++s) longest = std::max<int64_t>(longest, starts[s + 1] - starts[s]);
  // few long sequences go together, and share the threads operation by operation
  const bool shared_out = threads == 1 || 2 * threads * longest <= tokens;
  const int64_t chunks =
      shared_out ? round_up(std::max<int64_t>(1, (tokens + at_once / 2) / at_once), threads) : 1;
  std::atomic<int> failed{TL_OK};
  char reason[256] = {};  // of the first failure: messages are a thread's own
  parallel_for(chunks, threads, [&](int64_t chunk) {
    const auto begin = [&](int64_t c) {
      return std::lower_bound(starts, starts + sequences, static_cast<int32_t>(c * tokens / chunks)) - starts;
    };
    const int64_t first = begin(chunk), last = chunk + 1 == chunks ? sequences : begin(chunk + 1);
    if (first < last)
      if (int status = Chunk(all, first, last, shared_out ? 1 : threads).run()) {
        int none = TL_OK;
        if (failed.compare_exchange_strong(none, status)) std::strncpy(reason, tl_last_error(), sizeof reason - 1);
      }
  });
  return failed ? tl_fail(failed, "packed_blocks: %s", reason) : TL_OK;
}

}  // namespace TL_ISA

#define PARAMETERS                                                                                                     \
  (const void *x, const tl_block *blocks, const tl_norm *final_norm, const int32_t *starts, const float *bias,         \
   const float *cosines, const float *sines, void *const *outputs, int64_t sequences, int64_t count, int64_t width,    \
   int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t k_offset, int64_t v_offset, int64_t bias_head,           \
   int64_t bias_row, int dtype, int placement, int rms, int activation, int causal, double scale, int threads)
TL_MATRIX_ENTRY(tl_packed_blocks_cpu, PARAMETERS,
                (x, blocks, final_norm, starts, bias, cosines, sines, outputs, sequences, count, width, heads, kv_heads,
                 head_dim, k_offset, v_offset, bias_head, bias_row, dtype, placement, rms, activation, causal, scale,
                 threads))
