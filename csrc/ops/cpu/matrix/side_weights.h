// The weights of a side block as its products take them, laid out once a call, and the gradients of a group of sequences.
#pragma once

#include "side_rounded.h"
#include "side_rows.h"
#include "tlfast.h"

namespace {

// The matrices of a block, which index the four below.
enum SideMatrix { QKV, OUTPUT, UP, DOWN, MATRICES };
constexpr int MATRIX_WEIGHT[MATRICES] = {TL_BLOCK_QKV_WEIGHT, TL_BLOCK_OUTPUT_WEIGHT, TL_BLOCK_UP_WEIGHT,
                                         TL_BLOCK_DOWN_WEIGHT};

struct SideShape {
  int64_t width, inner, hidden;

  explicit SideShape(const tl_side_block &block)
      : width(block.width), inner(block.heads * block.head_dim), hidden(block.hidden) {}
  int64_t outputs(int matrix) const {
    const int64_t of[MATRICES] = {3 * inner, width, hidden, width};
    return of[matrix];
  }
  int64_t inputs(int matrix) const {
    const int64_t of[MATRICES] = {width, inner, width, hidden};
    return of[matrix];
  }
  // The entries of a weight that is no matrix; 0 for a matrix.
  int64_t entries(int64_t weight) const {
    switch (weight) {
      case TL_BLOCK_QKV_BIAS:
        return 3 * inner;
      case TL_BLOCK_UP_BIAS:
        return hidden;
      case TL_BLOCK_QKV_WEIGHT:
      case TL_BLOCK_OUTPUT_WEIGHT:
      case TL_BLOCK_UP_WEIGHT:
      case TL_BLOCK_DOWN_WEIGHT:
        return 0;
      default:
        return width;
    }
  }
};

// Hands out pieces of one stretch of memory, on cache lines of their own.
class Pieces {
 public:
  explicit Pieces(uint8_t *from) : next_(from) {}
  template <class T>
  T *take(int64_t count) {
    uint8_t *piece = next_;
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T *>(piece);
  }
  int64_t bytes() const { return reinterpret_cast<intptr_t>(next_); }  // where it began at null

 private:
  uint8_t *next_;
};

// Vectors are padded with zeros, those absent are zeros; matrices for y = x w^T and, in a backward, for dx = dy w.
template <class Products>
struct SideWeights {
  using Operand = typename Products::Operand;
  const float *vectors[TL_BLOCK_WEIGHTS] = {};
  Operand forward[MATRICES] = {}, backward[MATRICES] = {};

  static int64_t bytes(const SideShape &shape, bool backward) {
    Pieces pieces(nullptr);
    for (int i = 0; i < TL_BLOCK_WEIGHTS; ++i) pieces.take<float>(padded(shape.entries(i)));
    for (int m = 0; m < MATRICES; ++m)
      for (int way = 0; way < 1 + backward; ++way)
        pieces.take<uint8_t>(Products::bytes(shape.outputs(m), shape.inputs(m)));
    return pieces.bytes();
  }

  SideWeights(const SideShape &shape, const int64_t *addresses, bool both_ways, uint8_t *memory) {
    Pieces pieces(memory);
    for (int i = 0; i < TL_BLOCK_WEIGHTS; ++i) {
      const int64_t entries = shape.entries(i);
      float *to = pieces.take<float>(padded(entries));
      std::memset(to, 0, sizeof(float) * padded(entries));
      if (addresses[i] != 0 && entries != 0) std::memcpy(to, reinterpret_cast<const float *>(addresses[i]), sizeof(float) * entries);
      vectors[i] = to;
    }
    for (int m = 0; m < MATRICES; ++m) {
      const int64_t outputs = shape.outputs(m), inputs = shape.inputs(m);
      const Matrix w{reinterpret_cast<const float *>(addresses[MATRIX_WEIGHT[m]]), outputs, inputs, inputs};
      forward[m] = Products::transposed_weight(w, pieces.take<uint8_t>(Products::bytes(outputs, inputs)));
      if (both_ways) backward[m] = Products::weight(w, pieces.take<uint8_t>(Products::bytes(outputs, inputs)));
    }
  }

  Norm attention_norm(const tl_side_block &block) const {
    return {vectors[TL_BLOCK_ATTENTION_NORM_WEIGHT], vectors[TL_BLOCK_ATTENTION_NORM_BIAS], block.rms != 0, block.eps};
  }
  Norm feed_forward_norm(const tl_side_block &block) const {
    return {vectors[TL_BLOCK_FEED_FORWARD_NORM_WEIGHT], vectors[TL_BLOCK_FEED_FORWARD_NORM_BIAS], block.rms != 0,
            block.eps};
  }
};

// The gradients that a group of sequences adds up. A matrix's is kept with its narrow side for rows: that of QKV and UP is
// transposed, so that of the two strips it is the product of the narrow one is.
struct SideGradients {
  float *matrices[MATRICES] = {};
  ColumnSums sums[TL_BLOCK_WEIGHTS] = {};
  bool empty[MATRICES] = {true, true, true, true};  // nothing added yet, nor cleared

  static bool is_transposed(int matrix) { return matrix == QKV || matrix == UP; }
  static int64_t rows(const SideShape &shape, int m) { return is_transposed(m) ? shape.inputs(m) : shape.outputs(m); }
  static int64_t stride(const SideShape &shape, int m) {
    return padded(is_transposed(m) ? shape.outputs(m) : shape.inputs(m));
  }

  static int64_t bytes(const SideShape &shape) {
    Pieces pieces(nullptr);
    SideGradients(shape, pieces);
    return pieces.bytes();
  }

  SideGradients() = default;
  SideGradients(const SideShape &shape, Pieces &pieces) {
    for (int m = 0; m < MATRICES; ++m) matrices[m] = pieces.take<float>(padded(rows(shape, m)) * stride(shape, m));
    for (int i = 0; i < TL_BLOCK_WEIGHTS; ++i)
      sums[i] = {pieces.take<float>(shape.entries(i)), pieces.take<double>(shape.entries(i)), shape.entries(i)};
  }

  void clear_sums() const {
    for (const ColumnSums &sum : sums) {
      std::memset(sum.block, 0, sizeof(float) * sum.width);
      std::memset(sum.total, 0, sizeof(double) * sum.width);
    }
  }
};

// The sum of the groups' gradients of a matrix, as the matrix lies.
static void write_matrix_gradient(const SideShape &shape, const SideGradients *groups, int64_t count, int m, float *to) {
  const int64_t rows = SideGradients::rows(shape, m), stride = SideGradients::stride(shape, m);
  const int64_t outputs = shape.outputs(m), inputs = shape.inputs(m);
  const bool is_transposed = SideGradients::is_transposed(m);
  const int64_t columns = is_transposed ? outputs : inputs;
  alignas(64) float tile[LANES * LANES];
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) {
      for (int64_t r = 0; r < LANES; ++r) {
        Vector sum = {};
        for (int64_t g = 0; g < count; ++g)
          if (!groups[g].empty[m]) sum += load(groups[g].matrices[m] + (i + r) * stride + j);
        store(tile + r * LANES, sum);
      }
      if (is_transposed) transpose(tile);
      const int64_t row = is_transposed ? j : i, column = is_transposed ? i : j;
      for (int64_t r = 0; r < std::min<int64_t>(LANES, outputs - row); ++r)
        std::memcpy(to + (row + r) * inputs + column, tile + r * LANES,
                    sizeof(float) * std::min<int64_t>(LANES, inputs - column));
    }
}

static void write_vector_gradient(const SideGradients *groups, int64_t count, int weight, int64_t width,
                                  float *to) {
  for (int64_t j = 0; j < width; ++j) {
    double sum = 0.0;
    for (int64_t g = 0; g < count; ++g) sum += groups[g].sums[weight].total[j];
    to[j] = static_cast<float>(sum);
  }
}

}  // namespace
