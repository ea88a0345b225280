#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "tlfast.h"

namespace {

struct Team {
  std::atomic<int64_t> next{0};
  int64_t chunks;
  tl_chunk_function function;
  void *context;
};

void work(void *data) {
  Team &team = *static_cast<Team *>(data);
  for (int64_t i = team.next.fetch_add(1); i < team.chunks; i = team.next.fetch_add(1)) team.function(team.context, i);
}

// GNU's and LLVM's/Intel's OpenMP runtimes both export this entry point; it is what `#pragma omp parallel` compiles to.
typedef void (*OmpParallel)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

OmpParallel omp_parallel() {
  static const OmpParallel found = reinterpret_cast<OmpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void tl_parallel_for(int64_t chunks, int threads, tl_chunk_function function, void *context) {
  const int64_t team_size = std::min<int64_t>(chunks, threads);
  if (team_size <= 1) {
    for (int64_t i = 0; i < chunks; ++i) function(context, i);
    return;
  }
  Team team;
  team.chunks = chunks;
  team.function = function;
  team.context = context;
  if (OmpParallel run = omp_parallel()) {
    run(work, &team, static_cast<unsigned>(team_size), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < team_size; ++i) helpers.emplace_back(work, &team);
  work(&team);
  for (std::thread &helper : helpers) helper.join();
}

const char *tl_thread_pool(void) { return omp_parallel() ? "OpenMP pool of this process" : "own threads"; }
