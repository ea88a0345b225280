// Threads for the CPU kernels. The library links no OpenMP of its own: a second pool beside torch's would oversubscribe
// the cores (its barriers spin). Instead it joins the OpenMP runtime already in the process, torch's.
#pragma once

#include <cstdint>

typedef void (*tl_chunk_function)(void *context, int64_t chunk);

// Calls function(context, i) for i in [0, chunks), on at most `threads` threads that take chunks in turn.
void tl_parallel_for(int64_t chunks, int threads, tl_chunk_function function, void *context);

// The same for a lambda: parallel_for(chunks, threads, [&](int64_t chunk) { ... }).
template <class Body>
static inline void parallel_for(int64_t chunks, int threads, Body body) {
  tl_parallel_for(
      chunks, threads, [](void *context, int64_t chunk) { (*static_cast<Body *>(context))(chunk); }, &body);
}
