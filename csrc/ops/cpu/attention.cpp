// Attention for small heads on the CPU, forward and backward (common/attention_head.h).
//
// One task is one (batch, head) pair, or one head over all batches where a bias gradient is summed over the batch: no
// two tasks write the same place and each sums in a fixed order, so results do not depend on the number of threads.
#include "attention_head.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"

namespace TL_ISA {

// body(task, workspace) for each task, on workers that each own a workspace.
template <class Body>
static int for_each_task(int64_t tasks, const Shape &shape, bool backward, int threads, Body body) {
  const int64_t workers = smaller(tasks, threads < 1 ? 1 : threads);
  const int64_t size = (Workspace::size(shape, backward) + 15) / 16 * 16;  // whole cache lines
  Scratch scratch(workers * size + 16);
  if (scratch.data == nullptr)
    return tl_fail(TL_OUT_OF_MEMORY, "attention: no memory for %lld floats of scratch", (long long)(workers * size));
  float *aligned = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(scratch.data) + 63) / 64 * 64);
  int64_t next = 0;
  parallel_for(workers, threads, [&](int64_t worker) {
    const Workspace work(aligned + worker * size, shape, backward);
    for (int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); task < tasks;
         task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))
      body(task, work);
  });
  return TL_OK;
}

// The C functions share everything after the pointers.
#define ATTENTION_PARAMETERS                                                                                       \
  int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t head_dim, int64_t q_batch, int64_t q_row,   \
      int64_t q_head, int64_t k_batch, int64_t k_row, int64_t k_head, int64_t v_batch, int64_t v_row,              \
      int64_t v_head, int64_t bias_batch, int64_t bias_head, int64_t bias_row, int dtype, int causal, double scale, \
      double dropout_p, uint64_t seed, int threads
#define ATTENTION_ARGUMENTS                                                                                        \
  batch, heads, queries, keys, head_dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,   \
      bias_batch, bias_head, bias_row, dtype, causal, scale, dropout_p, seed, threads
#define ATTENTION_PROBLEM                                                                             \
  {                                                                                                   \
    {batch, heads, queries, keys, head_dim}, {q, q_batch, q_row, q_head}, {k, k_batch, k_row, k_head}, \
        {v, v_batch, v_row, v_head}, bias, bias_batch, bias_head, bias_row, key_mask, keys, queries, dtype,  \
        causal != 0, static_cast<float>(scale), dropout_p, seed                                       \
  }

int tl_attention_forward_cpu(const void *q, const void *k, const void *v, const float *bias, const uint8_t *key_mask,
                             void *out, float *statistics, ATTENTION_PARAMETERS) {
  const Problem problem = ATTENTION_PROBLEM;
  const Target target = {out, queries * heads * head_dim, heads * head_dim, head_dim};
  return for_each_task(batch * heads, problem.shape, false, threads, [&](int64_t task, const Workspace &work) {
    forward_head(problem, work, task / heads, task % heads, target, statistics + 2 * task * queries);
  });
}

int tl_attention_backward_cpu(const void *dout, const void *q, const void *k, const void *v, const float *bias,
                              const uint8_t *key_mask, const void *out, const float *statistics, void *dq, void *dk,
                              void *dv, float *dbias, int64_t dbias_batch, ATTENTION_PARAMETERS) {
  const Problem problem = ATTENTION_PROBLEM;
  const int64_t row = heads * head_dim, map = queries * keys;
  const View out_view = {out, queries * row, row, head_dim}, dout_view = {dout, queries * row, row, head_dim};
  const bool sum_batch = dbias != nullptr && dbias_batch == 1;
  const auto target = [&](void *to, int64_t length) { return Target{to, length * row, row, head_dim}; };
  const int64_t batches_a_task = sum_batch ? batch : 1;
  const int64_t tasks = sum_batch ? heads : batch * heads;
  return for_each_task(tasks, problem.shape, true, threads, [&](int64_t task, const Workspace &work) {
    for (int64_t i = 0; i < batches_a_task; ++i) {
      const int64_t b = task / heads + i, h = task % heads, head = b * heads + h;
      const Gradients grads = {out_view,         dout_view,        statistics + 2 * head * queries,
                               target(dq, queries), target(dk, keys), target(dv, keys),
                               dbias == nullptr ? nullptr : dbias + (sum_batch ? h : head) * map};
      backward_head(problem, work, b, h, grads);
    }
  });
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_attention_forward_cpu,
             (const void *q, const void *k, const void *v, const float *bias, const uint8_t *key_mask, void *out,
              float *statistics, ATTENTION_PARAMETERS),
             (q, k, v, bias, key_mask, out, statistics, ATTENTION_ARGUMENTS))
TL_CPU_ENTRY(tl_attention_backward_cpu,
             (const void *dout, const void *q, const void *k, const void *v, const float *bias, const uint8_t *key_mask,
              const void *out, const float *statistics, void *dq, void *dk, void *dv, float *dbias, int64_t dbias_batch,
              ATTENTION_PARAMETERS),
             (dout, q, k, v, bias, key_mask, out, statistics, dq, dk, dv, dbias, dbias_batch, ATTENTION_ARGUMENTS))
