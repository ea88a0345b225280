// The backward of a bundle of sequences through a side block: recomputes its forward, but for the attention and the last
// product, a strip at a time.
#pragma once

#include "side_bundle.h"

namespace {

template <class Products>
class SideBackward : public SideBundle<Products> {
  using Base = SideBundle<Products>;
  using Base::attended, Base::attention_input, Base::attention_norm_, Base::block_, Base::bundle_,
      Base::feed_forward_drop_, Base::feed_forward_norm_, Base::for_each_sequence, Base::from, Base::from_batch,
      Base::in_batch, Base::kept_, Base::multiply, Base::output_drop_, Base::post_, Base::products_, Base::project,
      Base::row_number, Base::rows_at, Base::shape_, Base::statistics, Base::stride_, Base::strip,
      Base::to_feed_forward, Base::vector, Base::weights_, Base::work_, Base::x;

 public:
  using Base::Base;

  // dout, dx: of the batch; the weights' gradients are added to the group's.
  void run(const float *dout, float *dx, SideGradients &gradients) const {
    const int64_t width = shape_.width;
    project();
    for (int64_t first = 0; first < bundle_.rows; first += STRIP_ROWS) {
      const int64_t count = rows_at(first);
      to_feed_forward(first, count);
      feed_forward_backward(first, from_batch(dout, width, first, count, width, work_.dout), gradients);
      output_backward(first, count, in_batch(dx, width, first), gradients);
    }
    attention_backward();
    for (int64_t first = 0; first < bundle_.rows; first += STRIP_ROWS)
      input_backward(first, rows_at(first), in_batch(dx, width, first), gradients);
  }

 private:
  // The gradient of a weight, narrow^T wide of a strip.
  void add_gradient(SideGradients &gradients, SideMatrix m, const Matrix &narrow, const Matrix &wide) const {
    products_.multiply(gradients.matrices[m], SideGradients::stride(shape_, m), !gradients.empty[m],
                       Products::columns(narrow, work_.narrow), Products::wide(wide, work_.wide));
    gradients.empty[m] = false;
  }

  void drop(const Matrix &x, const Dropout &dropout, int64_t first) const {
    for (int64_t i = 0; i < x.rows; ++i) {
      const float *row = x.data + i * x.stride;
      if (dropout.threshold == 0)
        std::memcpy(work_.dropped[i], row, sizeof(float) * x.columns);
      else
        drop_row(row, work_.dropped[i], dropout, row_number(first + i), x.columns);
    }
  }

  // The gradient of the sum behind the feed-forward: dout, or what a norm makes of it.
  Matrix last_gradient(int64_t first, const Matrix &dout, const SideGradients &gradients) const {
    if (!post_) return dout;
    const Matrix last =
        from_batch(kept_.rows + shape_.inner, stride_, first, dout.rows, shape_.width, work_.last);
    for (int64_t i = 0; i < dout.rows; ++i)
      feed_forward_norm_.apply(last.data + i * last.stride, work_.normed[i], shape_.width, work_.centre[1][i],
                               work_.rstd[1][i]);
    differentiate_norm(feed_forward_norm_, dout, last, work_.centre[1], work_.rstd[1], work_.dlast,
                       gradients.sums[TL_BLOCK_FEED_FORWARD_NORM_WEIGHT],
                       gradients.sums[TL_BLOCK_FEED_FORWARD_NORM_BIAS]);
    return strip(work_.dlast, dout.rows, shape_.width);
  }

  // To dmiddle, the gradient of what the feed-forward reads, and dlast.
  void feed_forward_backward(int64_t first, const Matrix &dout, SideGradients &gradients) const {
    const int64_t count = dout.rows, hidden_width = work_.hidden.stride;
    multiply(work_.hidden, strip(work_.middle, count, shape_.width), weights_.forward[UP]);
    tl_with_activation(block_.activation, [&](auto activation) {
      for (int64_t i = 0; i < count; ++i)
        activate_row_with_slope(work_.hidden[i], vector(TL_BLOCK_UP_BIAS), work_.activated[i], hidden_width, activation);
    });
    const Matrix dlast = last_gradient(first, dout, gradients);
    drop(dlast, feed_forward_drop_, first);
    gradients.sums[TL_BLOCK_DOWN_BIAS].add(work_.dropped, count);
    multiply(work_.dhidden, strip(work_.dropped, count, shape_.width), weights_.backward[DOWN]);
    multiply_rows(work_.dhidden, work_.hidden, count, hidden_width);
    gradients.sums[TL_BLOCK_UP_BIAS].add(work_.dhidden, count);
    multiply(work_.dmiddle, strip(work_.dhidden, count, shape_.hidden), weights_.backward[UP]);
    add_gradient(gradients, DOWN, strip(work_.dropped, count, shape_.width),
                 strip(work_.activated, count, shape_.hidden));
    add_gradient(gradients, UP, strip(work_.middle, count, shape_.width), strip(work_.dhidden, count, shape_.hidden));
    if (post_) {
      add_rows(work_.dmiddle, dlast, shape_.width);
      differentiate_middle(attention_norm_, count, gradients.sums[TL_BLOCK_ATTENTION_NORM_WEIGHT],
                           gradients.sums[TL_BLOCK_ATTENTION_NORM_BIAS]);
    } else {
      differentiate_middle(feed_forward_norm_, count, gradients.sums[TL_BLOCK_FEED_FORWARD_NORM_WEIGHT],
                           gradients.sums[TL_BLOCK_FEED_FORWARD_NORM_BIAS]);
      add_rows(work_.dsum, dlast, shape_.width);
    }
  }

  // From dmiddle to the gradient of the sum behind the attention, in dsum.
  void differentiate_middle(const Norm &norm, int64_t count, const ColumnSums &weight, const ColumnSums &bias) const {
    differentiate_norm(norm, strip(work_.dmiddle, count, shape_.width), strip(work_.sum, count, shape_.width),
                       work_.centre[0], work_.rstd[0], work_.dsum, weight, bias);
  }

  // From the gradient of the sum behind the attention to that of its heads' output, and dx as far as it is known.
  void output_backward(int64_t first, int64_t count, const BatchRows &dx, SideGradients &gradients) const {
    const Matrix gradient = strip(work_.dsum, count, shape_.width);
    for (int64_t i = 0; i < count; ++i) std::memcpy(dx[i], work_.dsum[i], sizeof(float) * shape_.width);
    drop(gradient, output_drop_, first);
    const Matrix dropped = strip(work_.dropped, count, shape_.width);
    gradients.sums[TL_BLOCK_OUTPUT_BIAS].add(work_.dropped, count);
    multiply(from(work_.dattended, first), dropped, weights_.backward[OUTPUT]);
    add_gradient(gradients, OUTPUT, dropped, attended(first, count));
  }

  void attention_backward() const {
    for_each_sequence([&](int64_t b, int64_t row, const Problem &problem) {
      const Workspace workspace(work_.attention, problem.shape, true);
      const auto target = [&](int64_t part) {
        return Target{work_.dqkv[row] + part * shape_.inner, 0, work_.dqkv.stride, block_.head_dim};
      };
      const View out{kept_.rows + b * block_.length * stride_, 0, stride_, block_.head_dim};
      const View dout{work_.dattended[row], 0, work_.dattended.stride, block_.head_dim};
      for (int64_t h = 0; h < block_.heads; ++h)
        backward_head(problem, workspace, b, h,
                      {out, dout, statistics(b, h), target(0), target(1), target(2), nullptr});
    });
  }

  // From the gradients of queries, keys and values to dx.
  void input_backward(int64_t first, int64_t count, const BatchRows &dx, SideGradients &gradients) const {
    const RowsOf dqkv = from(work_.dqkv, first);
    const Matrix gradient = strip(dqkv, count, 3 * shape_.inner), input = attention_input(first, count);
    gradients.sums[TL_BLOCK_QKV_BIAS].add(dqkv, count);
    add_gradient(gradients, QKV, input, gradient);
    multiply(work_.output, gradient, weights_.backward[QKV]);
    const Matrix dinput = strip(work_.output, count, shape_.width);
    if (post_) return add_rows(dx, dinput, shape_.width);
    differentiate_norm(attention_norm_, dinput, x(first, count), work_.centre[0], work_.rstd[0], work_.dsum,
                       gradients.sums[TL_BLOCK_ATTENTION_NORM_WEIGHT], gradients.sums[TL_BLOCK_ATTENTION_NORM_BIAS]);
    add_rows(dx, strip(work_.dsum, count, shape_.width), shape_.width);
  }
};

}  // namespace
