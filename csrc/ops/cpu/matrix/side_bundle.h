// A bundle of sequences through a side block on one thread: its rows a strip of 64 at a time, its sequences' heads one
// after the other. Short sequences share a strip, so that a product is worth the reading of its weight, and that of two
// strips the reading of a gradient.
#pragma once

#include "attention_head.h"
#include "side_weights.h"

namespace {

// Neighbouring sequences up to each one's last token.
struct Bundle {
  int64_t first, end, rows;
};

// Rows of a bundle where they lie in the batch: `numbers` says which row there each is.
struct BatchRows {
  float *data;
  int64_t stride;
  const int64_t *numbers;
  float *operator[](int64_t row) const { return data + numbers[row] * stride; }
};

// What a forward leaves to the backward beside x. rows (batch, length, stride): the heads' output, and behind it, where
// norms stand behind the layers, the sum that the last one reads. statistics (batch, heads, length, 2): of the attention.
struct SideKept {
  float *rows, *statistics;

  static int64_t stride(const tl_side_block &block) {
    return block.heads * block.head_dim + (block.placement == TL_POST_NORM ? block.width : 0);
  }
};

// What a thread works in. Of the whole bundle: queries, keys and values, and the gradients in their attention; of a strip:
// everything else.
template <class Products>
struct SideWorkspace {
  int64_t *numbers;  // of a bundle's rows, in the batch
  RowsOf qkv, dqkv, dattended;
  float *attention;
  RowsOf x, attended, last, dout;  // of the batch, where they do not lie in a row
  RowsOf normed;               // x behind a norm before the layers
  RowsOf sum, middle, hidden;  // in the middle of the block, that behind a norm, the hidden layer
  RowsOf output;               // of a layer, before its bias
  RowsOf dsum, dlast, dmiddle, dropped, activated, dhidden;  // in a backward
  float *centre[2], *rstd[2];
  uint8_t *rows, *narrow, *wide;  // operands

  // longest: tokens of a sequence.
  SideWorkspace(const tl_side_block &block, int64_t longest, bool backward, Pieces &pieces) {
    const SideShape shape(block);
    const int64_t length = std::max<int64_t>(1, (longest + STRIP_ROWS - 1) / STRIP_ROWS) * STRIP_ROWS;
    const int64_t width = padded(shape.width), inner = padded(shape.inner), hidden_width = padded(shape.hidden);
    const auto take = [&](int64_t rows, int64_t stride) { return RowsOf{pieces.take<float>(rows * stride), stride}; };
    numbers = pieces.take<int64_t>(length);
    qkv = take(length, padded(3 * shape.inner));
    attention = pieces.take<float>(Workspace::size({1, block.heads, longest, longest, block.head_dim}, backward));
    for (RowsOf *rows : {&x, &normed, &sum, &middle, &output}) *rows = take(STRIP_ROWS, width);
    attended = take(STRIP_ROWS, inner);
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
    for (RowsOf *rows : {&last, &dout, &dsum, &dlast, &dmiddle, &dropped}) *rows = take(STRIP_ROWS, width);
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

template <class Products>
class SideBundle {
 public:
  using Operand = typename Products::Operand;
  using Weights = SideWeights<Products>;
  using Work = SideWorkspace<Products>;

  // lengths: tokens of each sequence of the batch.
  SideBundle(const tl_side_block &block, const Weights &weights, const Work &work, const float *x,
             const uint8_t *key_mask, const SideKept &kept, const Bundle &bundle, const int64_t *lengths)
      : block_(block), shape_(block), weights_(weights), work_(work), x_(x), kept_(kept), key_mask_(key_mask),
        bundle_(bundle), lengths_(lengths), stride_(SideKept::stride(block)), post_(block.placement == TL_POST_NORM),
        attention_norm_(weights.attention_norm(block)), feed_forward_norm_(weights.feed_forward_norm(block)),
        output_drop_(block.hidden_dropout, block.output_seed),
        feed_forward_drop_(block.hidden_dropout, block.feed_forward_seed) {
    int64_t row = 0;
    for (int64_t b = bundle.first; b < bundle.end; ++b)
      for (int64_t i = 0; i < lengths[b]; ++i) work.numbers[row++] = b * block.length + i;
  }

  // out: of the batch.
  void forward(float *out) const {
    project();
    attend();
    for (int64_t first = 0; first < bundle_.rows; first += STRIP_ROWS) {
      const int64_t count = rows_at(first);
      to_feed_forward(first, count);
      feed_forward(count);
      finish(first, count, in_batch(out, shape_.width, first));
    }
  }

 protected:
  int64_t rows_at(int64_t first) const { return std::min(STRIP_ROWS, bundle_.rows - first); }
  const float *vector(int weight) const { return weights_.vectors[weight]; }

  void multiply(const RowsOf &to, const Matrix &x, const Operand &weight) const {
    products_.multiply(to.data, to.stride, false, Products::rows(x, work_.rows), weight);
  }
  Matrix strip(const RowsOf &rows, int64_t count, int64_t columns) const {
    return {rows.data, count, columns, rows.stride};
  }
  static RowsOf from(const RowsOf &rows, int64_t first) { return {rows[first], rows.stride}; }

  // The rows from `first` of something of the batch, to be written to.
  BatchRows in_batch(float *data, int64_t stride, int64_t first) const { return {data, stride, work_.numbers + first}; }

  // The same to be read: where they lie, or, with padding between them, brought together.
  Matrix from_batch(const float *data, int64_t stride, int64_t first, int64_t count, int64_t columns,
                    const RowsOf &together) const {
    const int64_t *numbers = work_.numbers + first;
    if (numbers[count - 1] - numbers[0] == count - 1) return {data + numbers[0] * stride, count, columns, stride};
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(together[i], data + numbers[i] * stride, sizeof(float) * columns);
      std::memset(together[i] + columns, 0, sizeof(float) * (together.stride - columns));
    }
    return {together.data, count, columns, together.stride};
  }
  Matrix x(int64_t first, int64_t count) const {
    return from_batch(x_, shape_.width, first, count, shape_.width, work_.x);
  }
  Matrix attended(int64_t first, int64_t count) const {
    return from_batch(kept_.rows, stride_, first, count, shape_.inner, work_.attended);
  }

  // Calls body(b, row, problem) for each sequence b, which begins at that row of the bundle; of the batch its attention
  // knows the mask and the dropout's numbers alone.
  template <class Body>
  void for_each_sequence(Body body) const {
    for (int64_t b = bundle_.first, row = 0; b < bundle_.end; row += lengths_[b++])
      if (lengths_[b] > 0) body(b, row, attention_problem(b, row));
  }

  // What the attention of a strip reads: x, or its norm.
  Matrix attention_input(int64_t first, int64_t count) const {
    const Matrix rows = x(first, count);
    if (post_) return rows;
    for (int64_t i = 0; i < count; ++i)
      attention_norm_.apply(rows.data + i * rows.stride, work_.normed[i], shape_.width, work_.centre[0][i],
                            work_.rstd[0][i]);
    return strip(work_.normed, count, shape_.width);
  }

  void project() const {
    for (int64_t first = 0; first < bundle_.rows; first += STRIP_ROWS) {
      const int64_t count = rows_at(first);
      const RowsOf qkv = from(work_.qkv, first);
      multiply(qkv, attention_input(first, count), weights_.forward[QKV]);
      add_bias(qkv, vector(TL_BLOCK_QKV_BIAS), count, 3 * shape_.inner);
    }
  }

  void attend() const {
    for_each_sequence([&](int64_t b, int64_t, const Problem &problem) {
      const Workspace workspace(work_.attention, problem.shape, false);
      const Target attended{kept_.rows + b * block_.length * stride_, 0, stride_, block_.head_dim};
      for (int64_t h = 0; h < block_.heads; ++h) forward_head(problem, workspace, b, h, attended, statistics(b, h));
    });
  }

  float *statistics(int64_t b, int64_t head) const {
    return kept_.statistics + 2 * (b * block_.heads + head) * block_.length;
  }

  Problem attention_problem(int64_t b, int64_t row) const {
    const int64_t length = lengths_[b];
    const auto part = [&](int64_t index) {
      return View{work_.qkv[row] + index * shape_.inner, 0, work_.qkv.stride, block_.head_dim};
    };
    return {{1, block_.heads, length, length, block_.head_dim}, part(0), part(1), part(2), nullptr, 0, 0, 0, key_mask_,
            block_.length, block_.length, TL_F32, block_.causal != 0, static_cast<float>(block_.scale),
            block_.attention_dropout, block_.attention_seed};
  }

  // sum = residual + dropout(rows + bias), a strip's.
  template <class Rows>
  void add_dropped(const RowsOf &rows, int bias, const Matrix &residual, const Dropout &dropout, int64_t first,
                   const Rows &sum) const {
    add_bias(rows, vector(bias), residual.rows, shape_.width);
    for (int64_t i = 0; i < residual.rows; ++i)
      add_dropped_row(rows[i], residual.data + i * residual.stride, sum[i], dropout, row_number(first + i),
                      shape_.width);
  }
  int64_t row_number(int64_t row) const { return work_.numbers[row]; }

  // From the heads' output to what the feed-forward reads: `sum` and `middle`, its norm.
  void to_feed_forward(int64_t first, int64_t count) const {
    multiply(work_.output, attended(first, count), weights_.forward[OUTPUT]);
    add_dropped(work_.output, TL_BLOCK_OUTPUT_BIAS, x(first, count), output_drop_, first, work_.sum);
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

  void finish(int64_t first, int64_t count, const BatchRows &out) const {
    if (!post_) {
      add_dropped(work_.output, TL_BLOCK_DOWN_BIAS, strip(work_.sum, count, shape_.width), feed_forward_drop_, first,
                  out);
      return;
    }
    const BatchRows last = in_batch(kept_.rows + shape_.inner, stride_, first);
    add_dropped(work_.output, TL_BLOCK_DOWN_BIAS, strip(work_.middle, count, shape_.width), feed_forward_drop_, first,
                last);
    for (int64_t i = 0; i < count; ++i)
      feed_forward_norm_.apply(last[i], out[i], shape_.width, work_.centre[1][i], work_.rstd[1][i]);
  }

  const tl_side_block &block_;
  const SideShape shape_;
  const Weights &weights_;
  const Work &work_;
  const float *x_;
  const SideKept kept_;
  const uint8_t *key_mask_;
  const Bundle bundle_;
  const int64_t *lengths_;
  const int64_t stride_;  // of the kept rows
  const bool post_;
  const Norm attention_norm_, feed_forward_norm_;
  const Dropout output_drop_, feed_forward_drop_;
  const Products products_{};
};

}  // namespace
