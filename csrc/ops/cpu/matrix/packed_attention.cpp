// Attention over sequences packed one behind the other, forward only, for frozen models on the CPU.
//
// One task is a block of queries of one sequence and one head of keys: it packs the keys and values that its queries may
// see once, for all heads of queries that share them, and goes over its queries in strips of 32, over a strip's keys in
// panels (attention_products.h), with the softmax of a strip kept up to date from panel to panel. What a strip computes
// does not depend on how queries are cut into blocks, so results do not depend on the number of threads.
#include <limits>

#include "attention_products.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace TL_ISA {

static constexpr float INFINITE = std::numeric_limits<float>::infinity();
static constexpr int64_t MOST_QUERIES = 512, FEWEST_QUERIES = 32;  // of a task
static constexpr int64_t PRODUCTS_WORTH_A_THREAD = 500000;  // about 20 microseconds, what waking one takes
static constexpr int PARTS = STRIP / LANES;

struct Problem {
  Heads q, k, v;
  void *out;  // (tokens, heads, head_dim), contiguous
  const int32_t *starts, *starts_k;
  const float *bias;  // [heads][queries][keys] with strides, or null
  int64_t bias_head, bias_row;
  int64_t batch, heads, kv_heads;
  int64_t window;  // the farthest key seen, < 0 where there is no such limit
  bool causal;
  float scale;

  int64_t group() const { return heads / kv_heads; }
  int64_t longest(const int32_t *from) const {
    int64_t most = 0;
    for (int64_t b = 0; b < batch; ++b) most = larger(most, from[b + 1] - from[b]);
    return most;
  }
  // Multiplications of the scores, whole strips.
  int64_t products() const {
    int64_t pairs = 0;
    for (int64_t b = 0; b < batch; ++b)
      pairs += round_up(starts[b + 1] - starts[b], STRIP) * round_up(starts_k[b + 1] - starts_k[b], KEY_MULTIPLE);
    return pairs * heads * q.head_dim;
  }
};

struct Sequence {
  int64_t first_query, queries, first_key, keys;
  int64_t shift() const { return keys - queries; }  // causal: query i sees keys up to i + shift
};

// Queries [first, end) of a sequence, and the range of keys that any of them may see; it begins at a multiple of
// KEY_MULTIPLE and is empty where they see none.
struct Rows {
  int64_t first, end, first_key, end_key;

  Rows(const Problem &problem, const Sequence &sequence, int64_t from, int64_t count)
      : first(from), end(smaller(from + count, sequence.queries)), first_key(0), end_key(sequence.keys) {
    if (problem.window >= 0) {
      first_key = larger(0, first - problem.window) / KEY_MULTIPLE * KEY_MULTIPLE;
      end_key = smaller(end_key, end + problem.window);
    }
    if (problem.causal) end_key = smaller(end_key, end + sequence.shift());
    end_key = larger(end_key, first_key);
  }
};

// exp(x) of x <= 0 to about 1 ulp, as tl_expf (vec.h) computes it; below e^-87 it is 0, NaN stays NaN.
static inline Vector exponential(Vector x) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vector))));
  const Vector clamped = x < -87.0f ? splat(-87.0f) : x;
  const Vector shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = shifted - 12582912.0f;
  const Vector r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  Vector poly = 1.38888890e-3f * r + 8.33333377e-3f;
  poly = poly * r + 4.16666679e-2f;
  poly = poly * r + 1.66666667e-1f;
  poly = poly * r + 0.5f;
  poly = poly * (r * r) + r + 1.0f;
  const Vector power = (Vector)(((Bits)shifted << 23) + 0x3f800000);  // 2^n
  return x < -87.0f ? Vector{} : poly * power;
}

// Softmax over the panels so far: running maximum and sum of exponentials a query (Milakov and Gimelshein, 2018).
struct OnlineSoftmax {
  Vector maximum[PARTS], sum[PARTS], correction[PARTS];

  OnlineSoftmax() {
    for (int i = 0; i < PARTS; ++i) maximum[i] = splat(-INFINITE), sum[i] = correction[i] = Vector{};
  }

  // Turns `scale` times scores into exponentials, for `keys`, a multiple of 4, and the first `parts` vectors of queries;
  // the sums so far are to be multiplied by `correction`.
  void update(float *scores, int64_t keys, int64_t parts, float scale) {
    for (int64_t part = 0; part < parts; ++part, scores += LANES) {
      Vector largest[4] = {splat(-INFINITE), splat(-INFINITE), splat(-INFINITE), splat(-INFINITE)};
      for (int64_t j = 0; j < keys; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) largest[i] = larger(load(scores + (j + i) * STRIP), largest[i]);
      const Vector found = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])) * scale;
      const Vector next = larger(found, maximum[part]);
      // A query without a key so far: exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
      const Vector finite = next == -INFINITE ? Vector{} : next;
      Vector added[4] = {};
      for (int64_t j = 0; j < keys; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector e = exponential(load(scores + (j + i) * STRIP) * scale - finite);
          added[i] += e;
          store(scores + (j + i) * STRIP, e);
        }
      correction[part] = exponential(maximum[part] - finite);
      maximum[part] = next;
      sum[part] = sum[part] * correction[part] + ((added[0] + added[1]) + (added[2] + added[3]));
    }
  }
};

// The scores [key][STRIP] of one strip and panel, once they are products of queries and keys.
struct Panel {
  const Problem &problem;
  const Sequence &sequence;
  float *scores;
  int64_t first_query, queries, first_key, keys;

  void fill(int64_t from, int64_t to, float value) const {
    for (int64_t i = from * STRIP; i < to * STRIP; ++i) scores[i] = value;
  }

  void scale_and_add_bias(int64_t h) const {
    const float *bias = problem.bias + h * problem.bias_head + first_query * problem.bias_row + first_key;
    for (int64_t lane = 0; lane < queries; lane += LANES)
      for (int64_t key = 0; key < keys; key += LANES) {
        alignas(64) float tile[TILE] = {};
        const int64_t columns = smaller(LANES, keys - key);
        for (int64_t r = 0; r < smaller(LANES, queries - lane); ++r)
          std::memcpy(tile + r * LANES, bias + (lane + r) * problem.bias_row + key, sizeof(float) * columns);
        transpose(tile);
        for (int64_t j = 0; j < columns; ++j) {
          float *to = scores + (key + j) * STRIP + lane;
          store(to, load(to) * problem.scale + load(tile + j * LANES));
        }
      }
  }

  // A key is seen by an unbroken run of queries; the others' scores become -inf.
  void hide() const {
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t key = first_key + j - first_query;
      int64_t from = 0, to = STRIP - 1;
      if (problem.causal) from = key - sequence.shift();
      if (problem.window >= 0) {
        from = larger(from, key - problem.window);
        to = smaller(to, key + problem.window);
      }
      if (from <= 0 && to >= STRIP - 1) continue;
      float *row = scores + j * STRIP;
      for (int32_t lane = 0; lane < STRIP; ++lane) row[lane] = lane < from || lane > to ? -INFINITE : row[lane];
    }
  }
};

// sums [channel][STRIP] times `factor` -> rows of the output.
template <class T>
static void write_rows(T *to, int64_t stride, const float *sums, const Vector *factor, int64_t count,
                       int64_t head_dim) {
  for (int64_t lane = 0; lane < count; lane += LANES)
    for (int64_t d = 0; d < head_dim; d += LANES) {
      Vector rows[LANES];
      for (int c = 0; c < LANES; ++c) rows[c] = load(sums + (d + c) * STRIP + lane) * factor[lane / LANES];
      exchange_blocks<LANES / 2>(rows);
      for (int64_t r = 0; r < smaller(LANES, count - lane); ++r)
        write_lanes(to + (lane + r) * stride + d, rows[r], head_dim - d);
    }
}

// One worker: its packed keys and what a strip needs.
template <class Products>
struct Worker {
  const Problem &problem;
  Products products;
  float *scores, *sums, *part;  // [PANEL][STRIP], [depth][STRIP] twice

  static int64_t floats(int64_t head_dim, int64_t keys) {
    return round_up(Products::floats(head_dim, keys) + (PANEL + 2 * Products::padded(head_dim)) * STRIP, 16);
  }
  Worker(const Problem &p, float *memory, int64_t keys)
      : problem(p), products(memory + (PANEL + 2 * Products::padded(p.q.head_dim)) * STRIP, p.q.head_dim, keys),
        scores(memory), sums(memory + PANEL * STRIP), part(sums + products.depth * STRIP) {}

  void run(const Sequence &sequence, int64_t kv_head, int64_t first, int64_t count) {
    const Rows block(problem, sequence, first, count);
    if (block.first >= block.end) return;
    products.pack_keys(problem.k, problem.v, sequence.first_key + block.first_key, kv_head,
                       block.end_key - block.first_key);
    for (int64_t h = kv_head * problem.group(); h < (kv_head + 1) * problem.group(); ++h)
      for (int64_t row = block.first; row < block.end; row += STRIP)
        run_strip(sequence, block, h, Rows(problem, sequence, row, STRIP));
  }

  void run_strip(const Sequence &sequence, const Rows &block, int64_t h, const Rows &rows) {
    const int64_t count = rows.end - rows.first, head_dim = problem.q.head_dim;
    products.pack_queries(problem.q, sequence.first_query + rows.first, h, count);
    OnlineSoftmax softmax;
    if (rows.first_key == rows.end_key) std::memset(sums, 0, sizeof(float) * products.depth * STRIP);
    for (int64_t key = rows.first_key; key < rows.end_key; key += PANEL) {
      const int64_t keys = smaller(PANEL, rows.end_key - key), padded = round_up(keys, Products::KEYS_AT_ONCE);
      products.score(scores, key - block.first_key, padded);
      const Panel panel = {problem, sequence, scores, rows.first, count, key, keys};
      if (problem.bias != nullptr) panel.scale_and_add_bias(h);
      if (problem.causal || problem.window >= 0) panel.hide();
      panel.fill(keys, round_up(keys, 4), -INFINITE);
      softmax.update(scores, round_up(keys, 4), (count + LANES - 1) / LANES,
                     problem.bias == nullptr ? problem.scale : 1.0f);
      panel.fill(round_up(keys, 4), padded, 0.0f);
      products.weigh(key == rows.first_key ? sums : part, scores, key - block.first_key, padded);
      if (key != rows.first_key) add_part(softmax);
    }
    Vector reciprocal[PARTS];  // 0 for a query that sees no key
    for (int i = 0; i < PARTS; ++i) reciprocal[i] = softmax.sum[i] == 0.0f ? Vector{} : 1.0f / softmax.sum[i];
    const int64_t stride = problem.heads * head_dim;
    auto *to = static_cast<typename Products::Number *>(problem.out) +
               (sequence.first_query + rows.first) * stride + h * head_dim;
    write_rows(to, stride, sums, reciprocal, count, head_dim);
  }

  void add_part(const OnlineSoftmax &softmax) const {
    for (int64_t d = 0; d < products.depth * STRIP; d += STRIP)
      for (int i = 0; i < PARTS; ++i) {
        float *sum = sums + d + i * LANES;
        store(sum, load(sum) * softmax.correction[i] + load(part + d + i * LANES));
      }
  }
};

// Queries of a task: fewer where that gives each thread something to do.
static int64_t queries_a_task(const Problem &problem, int64_t longest, int threads) {
  int64_t queries = MOST_QUERIES;
  const auto tasks = [&] { return problem.batch * problem.kv_heads * ((longest + queries - 1) / queries); };
  while (queries > FEWEST_QUERIES && tasks() < 2 * threads) queries /= 2;
  return queries;
}

template <class Products>
static int run(const Problem &problem, int threads) {
  const int64_t longest = problem.longest(problem.starts), queries = queries_a_task(problem, longest, threads);
  const int64_t blocks = (longest + queries - 1) / queries, tasks = problem.batch * blocks * problem.kv_heads;
  if (tasks == 0) return TL_OK;
  const int64_t keys = round_up(problem.longest(problem.starts_k), KEY_MULTIPLE);
  const int64_t workers = smaller(smaller(tasks, threads), 1 + problem.products() / PRODUCTS_WORTH_A_THREAD);
  const int64_t floats = Worker<Products>::floats(problem.q.head_dim, keys);
  Scratch scratch(workers * floats + 16);
  if (scratch.data == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "packed_attention: no memory for %lld floats", (long long)(workers * floats));
  float *aligned = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(scratch.data) + 63) / 64 * 64);
  // Neighbouring heads share cache lines: a worker takes several tasks at a time, while there are many.
  const int64_t at_once = larger(1, smaller(problem.kv_heads, tasks / (8 * workers)));
  int64_t next = 0;
  parallel_for(workers, threads, [&](int64_t number) {
    Worker<Products> worker(problem, aligned + number * floats, keys);
    for (int64_t first = __atomic_fetch_add(&next, at_once, __ATOMIC_RELAXED); first < tasks;
         first = __atomic_fetch_add(&next, at_once, __ATOMIC_RELAXED))
      for (int64_t task = first; task < smaller(first + at_once, tasks); ++task) {
        const int64_t b = task / (blocks * problem.kv_heads), block = task / problem.kv_heads % blocks;
        const int32_t *at = problem.starts + b, *at_k = problem.starts_k + b;
        const Sequence sequence = {at[0], at[1] - at[0], at_k[0], at_k[1] - at_k[0]};
        worker.run(sequence, task % problem.kv_heads, block * queries, queries);
      }
  });
  return TL_OK;
}

int tl_packed_attention_cpu(const void *q, const void *k, const void *v, const int32_t *starts, const int32_t *starts_k,
                            const float *bias, const float *cosines, const float *sines, void *out, int64_t batch,
                            int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t q_row, int64_t q_head,
                            int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, int64_t bias_head,
                            int64_t bias_row, int64_t window, int dtype, int causal, double scale, int threads) {
  const Problem problem = {{q, q_row, q_head, head_dim, cosines, sines},
                           {k, k_row, k_head, head_dim, cosines, sines},
                           {v, v_row, v_head, head_dim, nullptr, nullptr},
                           out,
                           starts,
                           starts_k,
                           bias,
                           bias_head,
                           bias_row,
                           batch,
                           heads,
                           kv_heads,
                           window,
                           causal != 0,
                           static_cast<float>(scale)};
#if defined(__AVX512BF16__)
  if (dtype == TL_BF16) return run<Bf16Products>(problem, threads);
#endif
  return tl_with_dtype(dtype, [&](auto number) { return run<FloatProducts<decltype(number)>>(problem, threads); });
}

}  // namespace TL_ISA

#define PARAMETERS                                                                                                   \
  (const void *q, const void *k, const void *v, const int32_t *starts, const int32_t *starts_k, const float *bias,   \
   const float *cosines, const float *sines, void *out, int64_t batch, int64_t heads, int64_t kv_heads,              \
   int64_t head_dim, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,    \
   int64_t bias_head, int64_t bias_row, int64_t window, int dtype, int causal, double scale, int threads)
TL_MATRIX_ENTRY(tl_packed_attention_cpu, PARAMETERS,
                (q, k, v, starts, starts_k, bias, cosines, sines, out, batch, heads, kv_heads, head_dim, q_row, q_head,
                 k_row, k_head, v_row, v_head, bias_head, bias_row, window, dtype, causal, scale, threads))
