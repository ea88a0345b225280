// Working memory of a CPU kernel, uninitialised; data is null where there is none. Not
// std::vector: its functions would be merged across instruction sets (isa.h).
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

template <class T>
struct ScratchOf {
  T *data;
  explicit ScratchOf(int64_t count) : data(static_cast<T *>(std::malloc(static_cast<size_t>(count) * sizeof(T)))) {}
  ~ScratchOf() { std::free(data); }
  ScratchOf(const ScratchOf &) = delete;
  ScratchOf &operator=(const ScratchOf &) = delete;
};

using Scratch = ScratchOf<float>;

// Memory of this thread that the next call finds again, aligned to 64 bytes: fresh pages cost more than a small kernel
// takes to fill them. Slot tells apart what a thread uses at the same time. Given back when the thread ends.
template <int Slot>
inline uint8_t *kept_scratch(int64_t bytes) {
  struct Kept {
    uint8_t *data = nullptr;
    int64_t size = 0;
    ~Kept() { std::free(data); }
  };
  static thread_local Kept kept;
  if (bytes > kept.size) {
    std::free(kept.data);
    kept.size = (bytes + bytes / 4 + 63) / 64 * 64;
    kept.data = static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>(kept.size)));
    if (kept.data == nullptr) kept.size = 0;
  }
  return kept.data;
}

}  // namespace
