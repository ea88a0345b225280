// Sampling of a heterogeneous graph, hop by hop. What a node draws depends on the seed, the relation and the node alone, so
// threads may share the work in any way; nodes are then numbered in the order in which they are found, a type at a time.
#include <atomic>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "status.h"

namespace TL_ISA {

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr int64_t CHUNK = 256;  // nodes a task draws for
constexpr int64_t FEW = 32;     // so many draws are told apart by looking through them, more by a set of bits
constexpr int64_t LARGEST = 0x7fffffff;

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Random numbers of one node in one relation (splitmix64); tlfast/ops/sample_neighbours/reference.py draws the same.
struct Draws {
  uint64_t state;
  Draws(uint64_t seed, int64_t relation, int64_t node) {
    const uint64_t key = mix(seed + GOLDEN * static_cast<uint64_t>(relation + 1));
    state = mix(key + GOLDEN * static_cast<uint64_t>(node + 1));
  }
  // One of [0, count), count < 2^31: the upper half of a 64-bit number times count.
  int64_t below(uint64_t count) {
    state += GOLDEN;
    const uint64_t x = mix(state);
    return static_cast<int64_t>(((x >> 32) * count + (((x & 0xffffffffu) * count) >> 32)) >> 32);
  }
};

// An array that grows; false where there is no memory for it.
template <class T>
struct Array {
  T *data = nullptr;
  int64_t size = 0, capacity = 0;
  Array() = default;
  Array(const Array &) = delete;
  Array &operator=(const Array &) = delete;
  ~Array() { std::free(data); }
  bool resize(int64_t wanted) {
    if (wanted > capacity) {
      const int64_t room = wanted + wanted / 2 + 16;
      void *grown = std::realloc(data, static_cast<size_t>(room) * sizeof(T));
      if (grown == nullptr) return false;
      data = static_cast<T *>(grown);
      capacity = room;
    }
    size = wanted;
    return true;
  }
};

// Nodes of one type in the order in which they were found, and where each stands: a hash table with open addressing.
struct Found {
  Array<int64_t> nodes;
  uint64_t *slots = nullptr;  // node + 1 over place; 0: free
  int64_t mask = -1;
  int shift = 0;
  ~Found() { std::free(slots); }

  uint64_t *slot(int64_t node) const {
    int64_t at = static_cast<int64_t>((static_cast<uint64_t>(node + 1) * GOLDEN) >> shift);
    while (slots[at] != 0 && static_cast<int64_t>(slots[at] >> 32) != node + 1) at = (at + 1) & mask;
    return slots + at;
  }

  bool widen() {
    const int64_t count = mask < 0 ? 256 : 2 * (mask + 1);
    auto *wider = static_cast<uint64_t *>(std::calloc(static_cast<size_t>(count), sizeof(uint64_t)));
    if (wider == nullptr) return false;
    std::free(slots);
    slots = wider;
    mask = count - 1;
    shift = 64 - __builtin_ctzll(static_cast<uint64_t>(count));
    for (int64_t i = 0; i < nodes.size; ++i) *slot(nodes.data[i]) = entry(nodes.data[i], i);
    return true;
  }

  static uint64_t entry(int64_t node, int64_t place) {
    return static_cast<uint64_t>(node + 1) << 32 | static_cast<uint64_t>(place);
  }

  // Where the node stands, from now on if it is new; -1 where there is no memory.
  int64_t place(int64_t node) {
    if (2 * nodes.size > mask && !widen()) return -1;
    uint64_t *at = slot(node);
    if (*at != 0) return static_cast<int64_t>(*at & 0xffffffffu);
    const int64_t next = nodes.size;
    if (!nodes.resize(next + 1)) return -1;
    nodes.data[next] = node;
    *at = entry(node, next);
    return next;
  }
};

struct Sample {
  int64_t num_types, num_relations;
  Found *found;             // of each type
  Array<int32_t> *rowptr;   // of each relation, over the nodes of its target type
  Array<int32_t> *col;      // first the source's own number, then its place among those found
  Sample(int64_t types, int64_t relations)
      : num_types(types),
        num_relations(relations),
        found(new Found[static_cast<size_t>(types)]),
        rowptr(new Array<int32_t>[static_cast<size_t>(relations)]),
        col(new Array<int32_t>[static_cast<size_t>(relations)]) {}
  Sample(const Sample &) = delete;
  Sample &operator=(const Sample &) = delete;
  ~Sample() {
    delete[] found;
    delete[] rowptr;
    delete[] col;
  }
};

inline int64_t drawn(int64_t degree, int64_t fan_out, bool replace) {
  if (fan_out < 0) return degree;
  if (replace) return degree > 0 ? fan_out : 0;
  return degree < fan_out ? degree : fan_out;
}

// Rows of one relation for the nodes [begin, end) of its targets: how many edges each gets.
int count_edges(const tl_sampled_relation &relation, Sample &sample, int64_t r, int64_t begin, int64_t end,
                int64_t fan_out, bool replace) {
  Array<int32_t> &rowptr = sample.rowptr[r];
  if (!rowptr.resize(end + 1)) return tl_fail(TL_OUT_OF_MEMORY, "sample_neighbours: no memory for %lld rows", (long long)end);
  if (begin == 0) rowptr.data[0] = 0;
  const int64_t *nodes = sample.found[relation.target].nodes.data;
  int64_t total = rowptr.data[begin];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t v = nodes[i];
    total += drawn(relation.rowptr[v + 1] - relation.rowptr[v], fan_out, replace);
    if (total > LARGEST) return tl_fail(TL_BAD_ARGUMENT, "sample_neighbours: a relation gets more than 2^31 - 1 edges");
    rowptr.data[i + 1] = static_cast<int32_t>(total);
  }
  if (!sample.col[r].resize(total))
    return tl_fail(TL_OUT_OF_MEMORY, "sample_neighbours: no memory for %lld edges", (long long)total);
  return TL_OK;
}

// `count` different numbers below `degree`, ascending (Floyd's algorithm), told apart by looking through them.
void draw_few(Draws &draws, int64_t degree, int64_t count, int32_t *to) {
  int64_t held = 0;
  for (int64_t last = degree - count; last < degree; ++last) {
    int32_t next = static_cast<int32_t>(draws.below(static_cast<uint64_t>(last + 1)));
    int64_t at = 0;
    while (at < held && to[at] < next) ++at;
    if (at < held && to[at] == next) {  // then `last` itself, which is larger than all before
      next = static_cast<int32_t>(last);
      at = held;
    }
    for (int64_t i = held; i > at; --i) to[i] = to[i - 1];
    to[at] = next;
    ++held;
  }
}

// The same with a set of bits; false where there is no memory for it.
bool draw_many(Draws &draws, int64_t degree, int64_t count, int32_t *to) {
  const int64_t words = (degree + 63) / 64;
  auto *bits = reinterpret_cast<uint64_t *>(kept_scratch<0>(words * 8));
  if (bits == nullptr) return false;
  std::memset(bits, 0, static_cast<size_t>(words) * 8);
  for (int64_t last = degree - count; last < degree; ++last) {
    int64_t next = draws.below(static_cast<uint64_t>(last + 1));
    if (bits[next / 64] >> (next % 64) & 1) next = last;
    bits[next / 64] |= uint64_t{1} << (next % 64);
  }
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t left = bits[w]; left != 0; left &= left - 1)
      *to++ = static_cast<int32_t>(64 * w + __builtin_ctzll(left));
  return true;
}

// Positions among its `degree` edges that a node draws.
bool draw(Draws draws, int64_t degree, int64_t count, bool replace, bool all, int32_t *to) {
  if (replace && !all) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(draws.below(static_cast<uint64_t>(degree)));
  } else if (count == degree) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(i);
  } else if (count <= FEW) {
    draw_few(draws, degree, count, to);
  } else {
    return draw_many(draws, degree, count, to);
  }
  return true;
}

// Sources of the nodes [begin, end) of the relation's targets. Positions first and then what stands there: the reads of
// the second loop do not wait for each other.
bool draw_edges(const tl_sampled_relation &relation, const Sample &sample, int64_t r, int64_t begin, int64_t end,
                uint64_t seed, bool replace, bool all) {
  const int64_t *nodes = sample.found[relation.target].nodes.data;
  const int32_t *rowptr = sample.rowptr[r].data;
  int32_t *col = sample.col[r].data;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = relation.rowptr[nodes[i]], degree = relation.rowptr[nodes[i] + 1] - first;
    const int64_t count = rowptr[i + 1] - rowptr[i];
    if (count == 0) continue;
    int32_t *to = col + rowptr[i];
    if (!draw(Draws(seed, r, nodes[i]), degree, count, replace, all, to)) return false;
    for (int64_t e = 0; e < count; ++e) to[e] += static_cast<int32_t>(first);
  }
  for (int64_t e = rowptr[begin]; e < rowptr[end]; ++e) col[e] = relation.col[col[e]];
  return true;
}

// Ascending; rows are short and mostly sorted, long ones rare (Shell's sort).
void sort(int32_t *x, int64_t count) {
  for (int64_t gap = count / 9 * 4 + 1; gap > 0; gap = gap > 1 ? (gap * 4 + 4) / 9 : 0)
    for (int64_t i = gap; i < count; ++i) {
      const int32_t value = x[i];
      int64_t j = i;
      for (; j >= gap && x[j - gap] > value; j -= gap) x[j] = x[j - gap];
      x[j] = value;
    }
}

// Gives the sources of the nodes [begin, end) of the relation's targets their places.
bool number(const tl_sampled_relation &relation, Sample &sample, int64_t r, int64_t begin, int64_t end) {
  Found &sources = sample.found[relation.source];
  const int32_t *rowptr = sample.rowptr[r].data;
  int32_t *col = sample.col[r].data;
  for (int64_t e = rowptr[begin]; e < rowptr[end]; ++e) {
    const int64_t place = sources.place(col[e]);
    if (place < 0) return false;
    col[e] = static_cast<int32_t>(place);
  }
  for (int64_t i = begin; i < end; ++i) sort(col + rowptr[i], rowptr[i + 1] - rowptr[i]);
  return true;
}

struct Request {
  const tl_sampled_relation *relations;
  const int64_t *fan_outs;  // of this hop
  uint64_t seed;
  bool replace;
  int threads;
};

// One hop: edges into the nodes [begins[t], ends[t]) of each type.
int hop(const Request &request, Sample &sample, const int64_t *begins, const int64_t *ends) {
  for (int64_t r = 0; r < sample.num_relations; ++r) {
    const int64_t t = request.relations[r].target;
    const int status = count_edges(request.relations[r], sample, r, begins[t], ends[t], request.fan_outs[r], request.replace);
    if (status != TL_OK) return status;
  }
  int64_t chunks = 1;
  for (int64_t t = 0; t < sample.num_types; ++t) {
    const int64_t parts = (ends[t] - begins[t] + CHUNK - 1) / CHUNK;
    chunks = parts > chunks ? parts : chunks;
  }
  std::atomic<bool> failed{false};
  parallel_for(chunks * sample.num_relations, request.threads, [&](int64_t task) {
    const int64_t r = task / chunks, t = request.relations[r].target;
    const int64_t begin = begins[t] + task % chunks * CHUNK, end = begin + CHUNK < ends[t] ? begin + CHUNK : ends[t];
    if (begin >= end) return;
    if (!draw_edges(request.relations[r], sample, r, begin, end, request.seed, request.replace, request.fan_outs[r] < 0))
      failed = true;
  });
  parallel_for(sample.num_types, request.threads, [&](int64_t type) {
    for (int64_t r = 0; r < sample.num_relations; ++r) {
      const int64_t t = request.relations[r].target;
      if (request.relations[r].source == type && begins[t] < ends[t] && !failed)
        if (!number(request.relations[r], sample, r, begins[t], ends[t])) failed = true;
    }
  });
  return failed ? tl_fail(TL_OUT_OF_MEMORY, "sample_neighbours: no memory for the nodes that were found") : TL_OK;
}

// nodes (types, hops + 1) and edges (relations, hops + 1), found within so many hops.
void record(const Sample &sample, int64_t *counts, int64_t hops, int64_t done) {
  for (int64_t t = 0; t < sample.num_types; ++t) counts[t * (hops + 1) + done] = sample.found[t].nodes.size;
  int64_t *edges = counts + sample.num_types * (hops + 1);
  for (int64_t r = 0; r < sample.num_relations; ++r) edges[r * (hops + 1) + done] = sample.col[r].size;
}

int run(const Request &request, Sample &sample, const int64_t *seeds, const int64_t *num_seeds, int64_t hops,
        int64_t *counts) {
  for (int64_t t = 0; t < sample.num_types; ++t)
    for (int64_t i = 0; i < num_seeds[t]; ++i) {
      const int64_t place = sample.found[t].place(*seeds);
      if (place < 0) return tl_fail(TL_OUT_OF_MEMORY, "sample_neighbours: no memory for the seeds");
      if (place != i) return tl_fail(TL_BAD_ARGUMENT, "sample_neighbours: seed %lld occurs twice", (long long)*seeds);
      ++seeds;
    }
  record(sample, counts, hops, 0);
  Array<int64_t> begins, ends;
  if (!begins.resize(sample.num_types) || !ends.resize(sample.num_types))
    return tl_fail(TL_OUT_OF_MEMORY, "sample_neighbours: no memory for the types");
  for (int64_t h = 0; h < hops; ++h) {
    for (int64_t t = 0; t < sample.num_types; ++t) {
      begins.data[t] = h == 0 ? 0 : ends.data[t];
      ends.data[t] = 0;
    }
    for (int64_t t = 0; t < sample.num_types; ++t) ends.data[t] = sample.found[t].nodes.size;
    Request step = request;
    step.fan_outs += h * sample.num_relations;
    const int status = hop(step, sample, begins.data, ends.data);
    if (status != TL_OK) return status;
    record(sample, counts, hops, h + 1);
  }
  return TL_OK;
}

}  // namespace

int tl_sample_neighbours_cpu(const tl_sampled_relation *relations, const int64_t *seeds, const int64_t *num_seeds,
                             const int64_t *fan_outs, int64_t *counts, void **handle, int64_t num_types,
                             int64_t num_relations, int64_t hops, uint64_t seed, int replace, int threads) {
  auto *sample = new Sample(num_types, num_relations);
  const int status =
      run({relations, fan_outs, seed, replace != 0, threads}, *sample, seeds, num_seeds, hops, counts);
  if (status != TL_OK) {
    delete sample;
    return status;
  }
  *handle = sample;
  return TL_OK;
}

int tl_sample_take_cpu(void *handle, const int64_t *targets, int64_t *nodes, int32_t *rowptr, int32_t *col) {
  auto *sample = static_cast<Sample *>(handle);
  for (int64_t t = 0; t < sample->num_types && nodes != nullptr; ++t) {
    const Array<int64_t> &found = sample->found[t].nodes;
    if (found.size > 0) std::memcpy(nodes, found.data, static_cast<size_t>(found.size) * sizeof(int64_t));
    nodes += found.size;
  }
  for (int64_t r = 0; r < sample->num_relations && rowptr != nullptr; ++r) {
    const Array<int32_t> &starts = sample->rowptr[r], &edges = sample->col[r];
    const int64_t rows = sample->found[targets[r]].nodes.size;
    if (starts.size > 0) std::memcpy(rowptr, starts.data, static_cast<size_t>(starts.size) * sizeof(int32_t));
    for (int64_t i = starts.size; i <= rows; ++i) rowptr[i] = static_cast<int32_t>(edges.size);
    rowptr += rows + 1;
    if (edges.size > 0) std::memcpy(col, edges.data, static_cast<size_t>(edges.size) * sizeof(int32_t));
    col += edges.size;
  }
  delete sample;
  return TL_OK;
}

// Columns become rows. Each relation on a thread of its own; a row's columns come out ascending.
int tl_transpose_rows_cpu(const tl_rows *relations, int64_t num_relations, int threads) {
  parallel_for(num_relations, threads, [&](int64_t r) {
    const tl_rows &one = relations[r];
    int32_t *starts = one.transposed_rowptr;
    std::memset(starts, 0, static_cast<size_t>(one.columns + 1) * sizeof(int32_t));
    const int64_t edges = one.rowptr[one.rows];
    for (int64_t e = 0; e < edges; ++e) ++starts[one.col[e] + 1];
    for (int64_t c = 0; c < one.columns; ++c) {
      one.transposed_inverse[c] = starts[c + 1] > 0 ? 1.0f / static_cast<float>(starts[c + 1]) : 0.0f;
      starts[c + 1] += starts[c];
    }
    for (int64_t i = 0; i < one.rows; ++i) {
      const int32_t degree = one.rowptr[i + 1] - one.rowptr[i];
      one.inverse[i] = degree > 0 ? 1.0f / static_cast<float>(degree) : 0.0f;
      for (int64_t e = one.rowptr[i]; e < one.rowptr[i + 1]; ++e)
        one.transposed_col[starts[one.col[e]]++] = static_cast<int32_t>(i);
    }
    for (int64_t c = one.columns; c > 0; --c) starts[c] = starts[c - 1];  // each has moved on to the next row's start
    starts[0] = 0;
  });
  return TL_OK;
}

}  // namespace TL_ISA

TL_CPU_ENTRY(tl_sample_neighbours_cpu,
             (const tl_sampled_relation *relations, const int64_t *seeds, const int64_t *num_seeds,
              const int64_t *fan_outs, int64_t *counts, void **handle, int64_t num_types, int64_t num_relations,
              int64_t hops, uint64_t seed, int replace, int threads),
             (relations, seeds, num_seeds, fan_outs, counts, handle, num_types, num_relations, hops, seed, replace,
              threads))
TL_CPU_ENTRY(tl_sample_take_cpu,
             (void *handle, const int64_t *targets, int64_t *nodes, int32_t *rowptr, int32_t *col),
             (handle, targets, nodes, rowptr, col))
TL_CPU_ENTRY(tl_transpose_rows_cpu, (const tl_rows *relations, int64_t num_relations, int threads),
             (relations, num_relations, threads))
