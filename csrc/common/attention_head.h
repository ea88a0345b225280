// Attention of one head, for heads of few channels: a forward, and a backward that recomputes the probabilities.
//
// Everything is cut into tiles of LANES queries x LANES keys, with queries along the vector lanes: softmax statistics
// then need no sum across lanes. A head's rows are packed as [tile][depth][LANES] fp32, which serves both as the vector
// and as the broadcast operand, so two products (multiply_tile, accumulate_tile) are all that either direction needs.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "dropout.h"
#include "head_tiles.h"
#include "isa.h"
#include "vec.h"

namespace {

static constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Which keys of a tile take part.
static constexpr float NO_KEY = 0.0f, SOME_KEYS = 1.0f, ALL_KEYS = 2.0f;

struct Problem {
  Shape shape;
  View q, k, v;
  const float *bias;
  int64_t bias_batch, bias_head, bias_row;
  const uint8_t *key_mask;
  int64_t mask_batch;    // its stride
  int64_t dropout_rows;  // queries a head has in the dropout mask's numbering
  int dtype;
  bool causal;
  float scale;
  double dropout_p;
  uint64_t seed;
};

// One worker's share of the scratch: a head's keys and values, one tile of rows.
struct Workspace {
  float *penalty;    // [padded_keys] 0, or -inf where the key is masked or padding
  float *tile_kind;  // [padded_keys / LANES]
  float *k, *v;      // [padded_keys, depth] as tiles
  float *dk, *dv;    // backward only
  float *q, *dout;   // [depth, LANES]
  float *rows;       // [depth, LANES]: the output's or dq's accumulator

  static int64_t size(const Shape &shape, bool backward) {
    return shape.padded_keys() * (2 + (backward ? 4 : 2) * shape.depth()) + 3 * LANES * shape.depth();
  }
  Workspace(float *from, const Shape &shape, bool backward) {
    const int64_t keys = shape.padded_keys(), row_tile = LANES * shape.depth();
    const auto take = [&from](int64_t count) { return (from += count) - count; };
    k = take(keys * shape.depth());
    v = take(keys * shape.depth());
    dk = backward ? take(keys * shape.depth()) : nullptr;
    dv = backward ? take(keys * shape.depth()) : nullptr;
    q = take(row_tile);
    dout = take(row_tile);
    rows = take(row_tile);
    penalty = take(keys);
    tile_kind = take(keys);
  }
};

static void pack_keys(const Problem &problem, const Workspace &work, int64_t b, int64_t h) {
  const Shape &shape = problem.shape;
  const uint8_t *keep = problem.key_mask == nullptr ? nullptr : problem.key_mask + b * problem.mask_batch;
  pack(work.k, problem.k, problem.dtype, b, h, 0, shape.keys, keep, shape, 1.0f);
  pack(work.v, problem.v, problem.dtype, b, h, 0, shape.keys, keep, shape, 1.0f);
  for (int64_t first = 0; first < shape.padded_keys(); first += LANES) {
    int kept = 0;
    for (int64_t j = first; j < first + LANES; ++j) {
      const bool allowed = j < shape.keys && (keep == nullptr || keep[j]);
      work.penalty[j] = allowed ? 0.0f : -INFINITE;
      kept += allowed;
    }
    work.tile_kind[first / LANES] = kept == 0 ? NO_KEY : kept == LANES ? ALL_KEYS : SOME_KEYS;
  }
}

// One tile of queries: which rows they are, and the part of a tile's scores that depends on position.
struct Rows {
  const Problem &problem;
  const Workspace &work;
  const float *bias;  // at [first, 0] of this batch and head, or null
  int64_t first, count, last_key;
  uint32_t row_key[LANES] = {};
  uint32_t threshold;

  Rows(const Problem &p, const Workspace &w, int64_t b, int64_t h, int64_t first_row)
      : problem(p), work(w), bias(p.bias), first(first_row), threshold(tl_dropout_threshold(p.dropout_p)) {
    const Shape &shape = p.shape;
    count = smaller(LANES, shape.queries - first);
    last_key = p.causal ? smaller(shape.keys - 1, first + count - 1 + shape.causal_shift()) : shape.keys - 1;
    if (bias != nullptr) bias += b * p.bias_batch + h * p.bias_head + first * p.bias_row;
    if (threshold == 0) return;
    for (int64_t r = 0; r < count; ++r)
      row_key[r] = tl_dropout_row_key(p.seed, static_cast<uint64_t>((b * shape.heads + h) * p.dropout_rows + first + r));
  }

  void add_bias(float *scores, int64_t key) const {
    alignas(64) float tile[TILE] = {};
    const int64_t columns = smaller(LANES, problem.shape.keys - key);
    for (int64_t r = 0; r < count; ++r) std::memcpy(tile + r * LANES, bias + r * problem.bias_row + key, 4 * columns);
    transpose(tile);
    for (int j = 0; j < LANES; ++j) store(scores + j * LANES, load(scores + j * LANES) + load(tile + j * LANES));
  }

  void hide_future(float *scores, int64_t key) const {
    for (int64_t j = 0; j < LANES; ++j) {
      const int64_t first_seeing = key + j - problem.shape.causal_shift() - first;  // the lane that may see this key
      for (int64_t r = 0; r < smaller(LANES, first_seeing); ++r) scores[j * LANES + r] = -INFINITE;
    }
  }

  // scores[j][lane] of keys `key` to `key + LANES`; false where no key of the tile is allowed.
  bool score(float *scores, int64_t key) const {
    const float kind = work.tile_kind[key / LANES];
    if (kind == NO_KEY) return false;
    multiply_tile(scores, work.q, work.k + key * problem.shape.depth(), problem.shape.depth());
    if (bias != nullptr) add_bias(scores, key);
    if (kind == SOME_KEYS)
      for (int j = 0; j < LANES; ++j) store(scores + j * LANES, load(scores + j * LANES) + work.penalty[key + j]);
    if (problem.causal && key + LANES - 1 > first + problem.shape.causal_shift()) hide_future(scores, key);
    return true;
  }

  bool keeps(int64_t key, int lane) const {
    return tl_dropout_keep(row_key[lane], static_cast<uint32_t>(key), threshold);
  }
};

static void exponentials(float *scores, const float *maximum) {
#if defined(__AVX512F__)
  const Vector offset = load(maximum);
#pragma GCC unroll 16
  for (int j = 0; j < LANES; ++j) store(scores + j * LANES, tl_exponential(load(scores + j * LANES) - offset));
#else
  for (int j = 0; j < LANES; ++j)
    for (int r = 0; r < LANES; ++r) scores[j * LANES + r] = tl_expf(scores[j * LANES + r] - maximum[r]);
#endif
}

// Softmax over the keys seen so far: running maximum and sum of exponentials a row (Milakov and Gimelshein, 2018).
struct OnlineSoftmax {
  Vector maximum = splat(-INFINITE), sum = {};

  // Turns scores into exponentials and returns what the sums so far are to be multiplied by.
  Vector update(float *scores) {
    Vector partial[4] = {maximum, maximum, maximum, maximum};
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) partial[j % 4] = larger(load(scores + j * LANES), partial[j % 4]);
    const Vector next = larger(larger(partial[0], partial[1]), larger(partial[2], partial[3]));
    // A row without an allowed key so far: exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
    const Vector finite = next == -INFINITE ? Vector{} : next;
    alignas(64) float offset[LANES], correction[LANES];
    store(offset, finite);
    exponentials(scores, offset);
    store(correction, maximum - finite);
    for (int r = 0; r < LANES; ++r) correction[r] = tl_expf(correction[r]);
    Vector added[4] = {};
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) added[j % 4] += load(scores + j * LANES);
    maximum = next;
    sum = sum * load(correction) + ((added[0] + added[1]) + (added[2] + added[3]));
    return load(correction);
  }
};

static void scale_rows(float *rows, int64_t depth, Vector factor) {
  for (int64_t d = 0; d < depth; ++d) store(rows + d * LANES, load(rows + d * LANES) * factor);
}

static void drop(float *probabilities, const Rows &rows, int64_t key) {
  for (int j = 0; j < LANES; ++j)
    for (int r = 0; r < LANES; ++r) {
      const float probability = probabilities[j * LANES + r];
      const float kept = rows.keeps(key + j, r) ? probability : 0.0f;
      probabilities[j * LANES + r] = kept;
    }
}

static void forward_head(const Problem &problem, const Workspace &work, int64_t b, int64_t h, const Target &out,
                         float *statistics) {
  const Shape &shape = problem.shape;
  const int64_t depth = shape.depth();
  pack_keys(problem, work, b, h);
  for (int64_t first = 0; first < shape.queries; first += LANES) {
    const Rows rows(problem, work, b, h, first);
    pack(work.q, problem.q, problem.dtype, b, h, first, rows.count, nullptr, shape, problem.scale);
    std::memset(work.rows, 0, sizeof(float) * LANES * depth);
    OnlineSoftmax softmax;
    for (int64_t key = 0; key <= rows.last_key; key += LANES) {
      alignas(64) float tile[TILE];
      if (!rows.score(tile, key)) continue;
      scale_rows(work.rows, depth, softmax.update(tile));
      if (rows.threshold != 0) drop(tile, rows, key);
      accumulate_tile(work.rows, tile, work.v + key * depth, depth);
    }
    // A query that sees no key: maximum 0 and 1/sum 0, so that output and recomputed probabilities are 0.
    const auto blind = softmax.sum == 0.0f;
    const Vector reciprocal = blind ? Vector{} : 1.0f / softmax.sum, maximum = blind ? Vector{} : softmax.maximum;
    scale_rows(work.rows, depth, reciprocal * static_cast<float>(1.0 / (1.0 - problem.dropout_p)));
    unpack(out, work.rows, problem.dtype, b, h, first, rows.count, shape, 1.0f);
    float *row = statistics + 2 * first;
    for (int64_t r = 0; r < rows.count; ++r) {
      row[2 * r] = maximum[r];
      row[2 * r + 1] = reciprocal[r];
    }
  }
}

struct Gradients {
  View out, dout;
  const float *statistics;  // of this head, [Sq, 2]
  Target dq, dk, dv;
  float *dbias;  // of this head, [Sq, Sk], added to; null where not wanted
};

// What the backward knows of each query of a tile.
struct RowStatistics {
  alignas(64) float maximum[LANES], reciprocal[LANES], delta[LANES];  // delta = rowsum(dout * out)
};

// Exponentials and dP become what multiplied the values, and dS; lanes are queries.
static void score_gradients(float *p, float *dp, const Rows &rows, int64_t key, const RowStatistics &row, float kept) {
  if (rows.threshold == 0) {
    for (int j = 0; j < LANES; ++j)
      for (int r = 0; r < LANES; ++r) {
        const float probability = p[j * LANES + r] * row.reciprocal[r];
        dp[j * LANES + r] = probability * (dp[j * LANES + r] - row.delta[r]);
        p[j * LANES + r] = probability;
      }
    return;
  }
  for (int j = 0; j < LANES; ++j)
    for (int r = 0; r < LANES; ++r) {
      const float probability = p[j * LANES + r] * row.reciprocal[r];
      const float dropped = rows.keeps(key + j, r) ? kept * probability : 0.0f;
      dp[j * LANES + r] = dropped * dp[j * LANES + r] - probability * row.delta[r];
      p[j * LANES + r] = dropped;
    }
}

static void add_bias_gradient(float *dbias, const float *ds, const Rows &rows, int64_t key, int64_t keys) {
  const int64_t columns = smaller(LANES, keys - key);
  for (int64_t r = 0; r < rows.count; ++r)
    for (int64_t j = 0; j < columns; ++j) dbias[(rows.first + r) * keys + key + j] += ds[r * LANES + j];
}

// Rows past the last get a reciprocal of 0: probability 0.
static RowStatistics row_statistics(const Gradients &grads, const Rows &rows, const Workspace &work, int64_t b,
                                    int64_t h) {
  const Shape &shape = rows.problem.shape;
  pack(work.rows, grads.out, rows.problem.dtype, b, h, rows.first, rows.count, nullptr, shape, 1.0f);
  Vector delta = {};
  for (int64_t d = 0; d < shape.depth(); ++d) delta += load(work.dout + d * LANES) * load(work.rows + d * LANES);
  RowStatistics row = {};
  store(row.delta, delta);
  const float *from = grads.statistics + 2 * rows.first;
  for (int64_t r = 0; r < rows.count; ++r) {
    row.maximum[r] = from[2 * r];
    row.reciprocal[r] = from[2 * r + 1];
  }
  return row;
}

static void backward_head(const Problem &problem, const Workspace &work, int64_t b, int64_t h, const Gradients &grads) {
  const Shape &shape = problem.shape;
  const int64_t depth = shape.depth();
  const float kept = static_cast<float>(1.0 / (1.0 - problem.dropout_p));
  pack_keys(problem, work, b, h);
  std::memset(work.dk, 0, sizeof(float) * shape.padded_keys() * depth);
  std::memset(work.dv, 0, sizeof(float) * shape.padded_keys() * depth);
  for (int64_t first = 0; first < shape.queries; first += LANES) {
    const Rows rows(problem, work, b, h, first);
    pack(work.q, problem.q, problem.dtype, b, h, first, rows.count, nullptr, shape, problem.scale);
    pack(work.dout, grads.dout, problem.dtype, b, h, first, rows.count, nullptr, shape, 1.0f);
    const RowStatistics row = row_statistics(grads, rows, work, b, h);
    std::memset(work.rows, 0, sizeof(float) * LANES * depth);  // from here on it gathers dq
    for (int64_t key = 0; key <= rows.last_key; key += LANES) {
      alignas(64) float p[TILE], ds[TILE];
      if (!rows.score(p, key)) continue;
      exponentials(p, row.maximum);
      multiply_tile(ds, work.dout, work.v + key * depth, depth);
      score_gradients(p, ds, rows, key, row, kept);
      accumulate_tile(work.rows, ds, work.k + key * depth, depth);
      transpose(p);  // lanes are keys now
      accumulate_tile(work.dv + key * depth, p, work.dout, depth);
      transpose(ds);
      accumulate_tile(work.dk + key * depth, ds, work.q, depth);  // q carries the scale
      if (grads.dbias != nullptr) add_bias_gradient(grads.dbias, ds, rows, key, shape.keys);
    }
    unpack(grads.dq, work.rows, problem.dtype, b, h, first, rows.count, shape, problem.scale);
  }
  unpack(grads.dk, work.dk, problem.dtype, b, h, 0, shape.keys, shape, 1.0f);
  unpack(grads.dv, work.dv, problem.dtype, b, h, 0, shape.keys, shape, 1.0f);
}

}  // namespace
