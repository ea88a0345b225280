// A side block over whole sequences, forward and a backward that recomputes it: a thread takes a bundle of sequences
// through the block, a strip of rows at a time, so that nothing but input and output leaves its cache.
//
// Weights' gradients are added up a group of sequences at a time, and then over the groups in order. Which sequences a
// group and its bundles have depends on their lengths alone: results have the same bits for any number of threads.
#include <atomic>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "side_backward.h"
#include "status.h"

namespace TL_ISA {

static constexpr int64_t MOST_GROUPS = 8, GROUP_ROWS = 64;

// Tokens of a sequence up to its last one.
static int64_t tokens_of(const tl_side_block &block, const uint8_t *key_mask, int64_t b) {
  int64_t length = block.length;
  if (key_mask != nullptr)
    while (length > 0 && key_mask[b * block.length + length - 1] == 0) --length;
  return length;
}

struct Call {
  const tl_side_block &block;
  const SideShape shape;
  const float *x;
  const uint8_t *key_mask;
  int threads;
  int64_t *lengths, *starts;  // of the sequences; the first of each bundle. Null where there is no memory
  int64_t longest = 0, tokens = 0;

  Call(const tl_side_block &b, const float *from, const uint8_t *mask, int team)
      : block(b), shape(b), x(from), key_mask(mask), threads(std::max(team, 1)),
        lengths(reinterpret_cast<int64_t *>(kept_scratch<7>(sizeof(int64_t) * (2 * b.batch + 1)))),
        starts(lengths + b.batch) {
    for (int64_t i = 0; i < b.batch && lengths != nullptr; tokens += lengths[i++]) {
      lengths[i] = tokens_of(block, mask, i);
      longest = std::max(longest, lengths[i]);
    }
  }

  // The sequences from `first` that go together: at most so many rows, or one sequence.
  Bundle bundle(int64_t first, int64_t end, int64_t most_rows) const {
    Bundle found{first, first + 1, lengths[first]};
    while (found.end < end && found.rows + lengths[found.end] <= most_rows) found.rows += lengths[found.end++];
    return found;
  }

  // Zeros in the rows behind the last tokens.
  void clear_padding(float *rows, const Bundle &bundle) const {
    for (int64_t b = bundle.first; b < bundle.end; ++b)
      std::memset(rows + (b * block.length + lengths[b]) * block.width, 0,
                  sizeof(float) * (block.length - lengths[b]) * block.width);
  }
};

static int no_memory() { return tl_fail(TL_OUT_OF_MEMORY, "side_block: no memory to work in"); }

template <class Products>
static int forward(const Call &call, const int64_t *addresses, float *out, const SideKept &kept) {
  using Weights = SideWeights<Products>;
  using Work = SideWorkspace<Products>;
  const tl_side_block &block = call.block;
  uint8_t *memory = kept_scratch<5>(Weights::bytes(call.shape, false));
  if (memory == nullptr) return no_memory();
  const Weights weights(call.shape, addresses, false, memory);
  // a row's result does not depend on its bundle: the threads may share them out as they are
  const int64_t share = std::clamp(call.tokens / call.threads, BLOCK, STRIP_ROWS);
  int64_t count = 0;
  for (int64_t b = 0; b < block.batch; b = call.bundle(b, block.batch, share).end) call.starts[count++] = b;
  std::atomic<bool> failed{false};
  parallel_for(count, call.threads, [&](int64_t i) {
    uint8_t *mine = kept_scratch<6>(Work::bytes(block, call.longest, false));
    if (mine == nullptr) return failed.store(true);
    Pieces pieces(mine);
    const Work work(block, call.longest, false, pieces);
    const Bundle bundle = call.bundle(call.starts[i], block.batch, share);
    SideBundle<Products>(block, weights, work, call.x, call.key_mask, kept, bundle, call.lengths).forward(out);
    call.clear_padding(out, bundle);
  });
  return failed ? no_memory() : TL_OK;
}

// The first sequence of each group, and the end: groups of about the same number of tokens.
struct Groups {
  int64_t count, first[MOST_GROUPS + 1];

  explicit Groups(const Call &call)
      : count(std::min({MOST_GROUPS, call.block.batch, call.tokens / GROUP_ROWS + 1})) {
    int64_t before = 0, group = 0;
    for (int64_t b = 0; b < call.block.batch; before += call.lengths[b++])
      while (group <= before * count / std::max<int64_t>(call.tokens, 1) && group < count) first[group++] = b;
    while (group <= count) first[group++] = call.block.batch;
  }
};

template <class Products>
static int backward(const Call &call, const int64_t *addresses, const SideKept &kept, const float *dout, float *dx,
                    const int64_t *gradients) {
  using Weights = SideWeights<Products>;
  using Work = SideWorkspace<Products>;
  const Groups groups(call);
  const int64_t weight_bytes = Weights::bytes(call.shape, true), group_bytes = SideGradients::bytes(call.shape);
  uint8_t *memory = kept_scratch<5>(weight_bytes + groups.count * group_bytes);
  if (memory == nullptr) return no_memory();
  const Weights weights(call.shape, addresses, true, memory);
  Pieces pieces(memory + weight_bytes);
  SideGradients sums[MOST_GROUPS];
  for (int64_t g = 0; g < groups.count; ++g) sums[g] = SideGradients(call.shape, pieces);
  std::atomic<bool> failed{false};
  parallel_for(groups.count, call.threads, [&](int64_t g) {
    uint8_t *mine = kept_scratch<6>(Work::bytes(call.block, call.longest, true));
    if (mine == nullptr) return failed.store(true);
    Pieces own(mine);
    const Work work(call.block, call.longest, true, own);
    sums[g].clear_sums();
    for (int64_t b = groups.first[g], end = groups.first[g + 1]; b < end;) {
      const Bundle bundle = call.bundle(b, end, STRIP_ROWS);
      SideBackward<Products>(call.block, weights, work, call.x, call.key_mask, kept, bundle, call.lengths)
          .run(dout, dx, sums[g]);
      call.clear_padding(dx, bundle);
      b = bundle.end;
    }
  });
  if (failed) return no_memory();
  parallel_for(TL_BLOCK_WEIGHTS, call.threads, [&](int64_t weight) {
    auto *to = reinterpret_cast<float *>(gradients[weight]);
    if (to == nullptr) return;
    const int m = static_cast<int>(std::find(MATRIX_WEIGHT, MATRIX_WEIGHT + MATRICES, weight) - MATRIX_WEIGHT);
    if (m < MATRICES)
      write_matrix_gradient(call.shape, sums, groups.count, m, to);
    else
      write_vector_gradient(sums, groups.count, static_cast<int>(weight), call.shape.entries(weight), to);
  });
  return TL_OK;
}

int tl_side_block_forward_cpu(const tl_side_block *block, const int64_t *addresses, const float *x,
                              const uint8_t *key_mask, float *out, float *kept_rows, float *statistics, int threads) {
  const Call call(*block, x, key_mask, threads);
  if (call.lengths == nullptr) return no_memory();
  const SideKept kept{kept_rows, statistics};
  if (block->rounded) return forward<RoundedProducts>(call, addresses, out, kept);
  return forward<SplitProducts>(call, addresses, out, kept);
}

int tl_side_block_backward_cpu(const tl_side_block *block, const int64_t *addresses, const float *x,
                               const uint8_t *key_mask, const float *kept_rows, const float *statistics,
                               const float *dout, float *dx, const int64_t *gradients, int threads) {
  const Call call(*block, x, key_mask, threads);
  if (call.lengths == nullptr) return no_memory();
  const SideKept kept{const_cast<float *>(kept_rows), const_cast<float *>(statistics)};  // the backward reads them
  if (block->rounded) return backward<RoundedProducts>(call, addresses, kept, dout, dx, gradients);
  return backward<SplitProducts>(call, addresses, kept, dout, dx, gradients);
}

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_side_block_forward_cpu,
                (const tl_side_block *block, const int64_t *weights, const float *x, const uint8_t *key_mask,
                 float *out, float *kept_rows, float *statistics, int threads),
                (block, weights, x, key_mask, out, kept_rows, statistics, threads))
TL_MATRIX_ENTRY(tl_side_block_backward_cpu,
                (const tl_side_block *block, const int64_t *weights, const float *x, const uint8_t *key_mask,
                 const float *kept_rows, const float *statistics, const float *dout, float *dx,
                 const int64_t *gradients, int threads),
                (block, weights, x, key_mask, kept_rows, statistics, dout, dx, gradients, threads))
