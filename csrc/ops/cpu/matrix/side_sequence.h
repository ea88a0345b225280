// One sequence through a side block on one thread: its rows a strip of 128 at a time, its heads one after the other.
#pragma once

#include "attention_head.h"
#include "side_weights.h"

namespace {

// What a forward leaves to the backward beside x. rows (batch, length, stride): the heads' output, and behind it, where
// norms stand behind the layers, the sum that the last one reads. statistics (batch, heads, length, 2): of the attention.
struct SideKept {
  float *rows, *statistics;

  static int64_t stride(const tl_side_block &block) {
    return block.heads * block.head_dim + (block.placement == TL_POST_NORM ? block.width : 0);
  }
};

// What a thread works in. Of the whole sequence: queries, keys and values, and the gradients in their attention; of a
// strip: everything else.
template <class Products>
struct SideWorkspace {
  RowsOf qkv, dqkv, dattended;
  float *attention;
  RowsOf normed;               // x behind a norm before the layers
  RowsOf sum, middle, hidden;  // in the middle of the block, that behind a norm, the hidden layer
  RowsOf output;               // of a layer, before its bias
  RowsOf dsum, dlast, dmiddle, dropped, activated, dhidden;  // in a backward
  float *centre[2], *rstd[2];
  uint8_t *rows, *narrow, *wide;  // operands

  SideWorkspace(const tl_side_block &block, int64_t longest, bool backward, Pieces &pieces) {
    const SideShape shape(block);
    const int64_t length = (longest + STRIP_ROWS - 1) / STRIP_ROWS * STRIP_ROWS;
    const int64_t width = padded(shape.width), inner = padded(shape.inner), hidden_width = padded(shape.hidden);
    const auto take = [&](int64_t rows, int64_t stride) { return RowsOf{pieces.take<float>(rows * stride), stride}; };
    qkv = take(length, padded(3 * shape.inner));
    attention = pieces.take<float>(Workspace::size({1, block.heads, longest, longest, block.head_dim}, backward));
    for (RowsOf *rows : {&normed, &sum, &middle, &output}) *rows = take(STRIP_ROWS, width);
    hidden = take(STRIP_ROWS, hidden_width);
    const int64_t widest = std::max({width, hidden_width, padded(3 * shape.inner)});
    this->rows = pieces.take<uint8_t>(Products::bytes(STRIP_ROWS, widest));
    for (int norm = 0; norm < 2; ++norm) {
      centre[norm] = pieces.take<float>(STRIP_ROWS);
      rstd[norm] = pieces.take<float>(STRIP_ROWS);
    }
    if (!backward) return;
    dqkv = take(length, padded(3 * shape.inner));
    dattended = take(length, inner);
    for (RowsOf *rows : {&dsum, &dlast, &dmiddle, &dropped}) *rows = take(STRIP_ROWS, width);
    for (RowsOf *rows : {&activated, &dhidden}) *rows = take(STRIP_ROWS, hidden_width);
    narrow = pieces.take<uint8_t>(Products::bytes(STRIP_ROWS, width));
    wide = pieces.take<uint8_t>(Products::bytes(STRIP_ROWS, widest));
  }

  static int64_t bytes(const tl_side_block &block, int64_t longest, bool backward) {
    Pieces pieces(nullptr);
    SideWorkspace(block, longest, backward, pieces);
    return pieces.bytes();
  }
};

// A sequence of `length` tokens, number b of the batch.
template <class Products>
class SideSequence {
 public:
  using Operand = typename Products::Operand;
  using Weights = SideWeights<Products>;
  using Work = SideWorkspace<Products>;

  SideSequence(const tl_side_block &block, const Weights &weights, const Work &work, const float *x,
               const uint8_t *key_mask, const SideKept &kept, int64_t b, int64_t length)
      : block_(block), shape_(block), weights_(weights), work_(work), x_(x + b * block.length * block.width),
        attended_{kept.rows + b * block.length * SideKept::stride(block), SideKept::stride(block)},
        last_{attended_.data + shape_.inner, attended_.stride},
        statistics_(kept.statistics + b * block.heads * block.length * 2),
        key_mask_(key_mask == nullptr ? nullptr : key_mask + b * block.length), b_(b), length_(length),
        post_(block.placement == TL_POST_NORM), attention_norm_(weights.attention_norm(block)),
        feed_forward_norm_(weights.feed_forward_norm(block)), output_drop_(block.hidden_dropout, block.output_seed),
        feed_forward_drop_(block.hidden_dropout, block.feed_forward_seed) {}

  // out: this sequence's rows.
  void forward(float *out) const {
    project();
    attend();
    for (int64_t first = 0; first < length_; first += STRIP_ROWS) {
      const int64_t count = rows_at(first);
      to_feed_forward(first, count);
      feed_forward(count);
      finish(first, count, out + first * block_.width);
    }
  }

 protected:
  int64_t rows_at(int64_t first) const { return std::min(STRIP_ROWS, length_ - first); }
  const float *vector(int weight) const { return weights_.vectors[weight]; }

  void multiply(const RowsOf &to, const Matrix &x, const Operand &weight) const {
    products_.multiply(to.data, to.stride, false, Products::rows(x, work_.rows), weight);
  }
  Matrix strip(const RowsOf &rows, int64_t count, int64_t columns) const {
    return {rows.data, count, columns, rows.stride};
  }
  static RowsOf from(const RowsOf &rows, int64_t first) { return {rows[first], rows.stride}; }

  // What the attention of a strip reads: x, or its norm.
  Matrix attention_input(int64_t first, int64_t count) const {
    const float *x = x_ + first * block_.width;
    if (post_) return {x, count, shape_.width, block_.width};
    for (int64_t i = 0; i < count; ++i)
      attention_norm_.apply(x + i * block_.width, work_.normed[i], shape_.width, work_.centre[0][i], work_.rstd[0][i]);
    return strip(work_.normed, count, shape_.width);
  }

  void project() const {
    for (int64_t first = 0; first < length_; first += STRIP_ROWS) {
      const int64_t count = rows_at(first);
      const RowsOf qkv = from(work_.qkv, first);
      multiply(qkv, attention_input(first, count), weights_.forward[QKV]);
      add_bias(qkv, vector(TL_BLOCK_QKV_BIAS), count, 3 * shape_.inner);
    }
  }

  void attend() const {
    const Problem problem = attention_problem();
    const Workspace workspace(work_.attention, problem.shape, false);
    const Target attended{attended_.data, 0, attended_.stride, block_.head_dim};
    for (int64_t h = 0; h < block_.heads; ++h) forward_head(problem, workspace, b_, h, attended, statistics(h));
  }

  float *statistics(int64_t head) const { return statistics_ + 2 * head * block_.length; }

  Problem attention_problem() const {
    const auto part = [&](int64_t index) {
      return View{work_.qkv.data + index * shape_.inner, 0, work_.qkv.stride, block_.head_dim};
    };
    return {{1, block_.heads, length_, length_, block_.head_dim}, part(0), part(1), part(2), nullptr, 0, 0, 0,
            key_mask_, 0, block_.length, TL_F32, block_.causal != 0, static_cast<float>(block_.scale),
            block_.attention_dropout, block_.attention_seed};
  }

  // sum = residual + dropout(rows + bias), a strip's.
  void add_dropped(const RowsOf &rows, int bias, const Matrix &residual, const Dropout &dropout, int64_t first,
                   const RowsOf &sum) const {
    add_bias(rows, vector(bias), residual.rows, shape_.width);
    for (int64_t i = 0; i < residual.rows; ++i)
      add_dropped_row(rows[i], residual.data + i * residual.stride, sum[i], dropout, row_number(first + i),
                      shape_.width);
  }
  int64_t row_number(int64_t row) const { return b_ * block_.length + row; }

  // From the heads' output to what the feed-forward reads: `sum` and `middle`, its norm.
  void to_feed_forward(int64_t first, int64_t count) const {
    multiply(work_.output, strip(from(attended_, first), count, shape_.inner), weights_.forward[OUTPUT]);
    const Matrix x{x_ + first * block_.width, count, shape_.width, block_.width};
    add_dropped(work_.output, TL_BLOCK_OUTPUT_BIAS, x, output_drop_, first, work_.sum);
    const Norm &norm = post_ ? attention_norm_ : feed_forward_norm_;
    for (int64_t i = 0; i < count; ++i)
      norm.apply(work_.sum[i], work_.middle[i], shape_.width, work_.centre[0][i], work_.rstd[0][i]);
  }

  // To `output`, without the last bias.
  void feed_forward(int64_t count) const {
    multiply(work_.hidden, strip(work_.middle, count, shape_.width), weights_.forward[UP]);
    tl_with_activation(block_.activation, [&](auto activation) {
      for (int64_t i = 0; i < count; ++i)
        activate_row(work_.hidden[i], vector(TL_BLOCK_UP_BIAS), work_.hidden.stride, activation);
    });
    multiply(work_.output, strip(work_.hidden, count, shape_.hidden), weights_.forward[DOWN]);
  }

  void finish(int64_t first, int64_t count, float *out) const {
    const RowsOf rows{out, block_.width};
    if (!post_) {
      add_dropped(work_.output, TL_BLOCK_DOWN_BIAS, strip(work_.sum, count, shape_.width), feed_forward_drop_, first,
                  rows);
      return;
    }
    const RowsOf last = from(last_, first);
    add_dropped(work_.output, TL_BLOCK_DOWN_BIAS, strip(work_.middle, count, shape_.width), feed_forward_drop_, first,
                last);
    for (int64_t i = 0; i < count; ++i)
      feed_forward_norm_.apply(last[i], rows[i], shape_.width, work_.centre[1][i], work_.rstd[1][i]);
  }

  const tl_side_block &block_;
  const SideShape shape_;
  const Weights &weights_;
  const Work &work_;
  const float *x_;
  const RowsOf attended_, last_;
  float *statistics_;
  const uint8_t *key_mask_;
  const int64_t b_, length_;
  const bool post_;
  const Norm attention_norm_, feed_forward_norm_;
  const Dropout output_drop_, feed_forward_drop_;
  const Products products_{};
};

}  // namespace
