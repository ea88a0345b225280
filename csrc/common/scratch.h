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

}  // namespace
