// A row of floats or halves a vector at a time: GCC/Clang vector extensions, and intrinsics where these narrow badly.
// A body is written once for both kinds of value, Lanes in the row and float at its end:
//
//   Sums sums;
//   sweep(width, [&](auto kind, int64_t j, int part) TL_INLINE { sums.add(load<decltype(kind)>(x + j), part); });
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "inline.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define TL_WIDE 16
#elif defined(__AVX2__)
#define TL_WIDE 8
#else
#define TL_WIDE 4
#endif

namespace {

constexpr int64_t WIDE = TL_WIDE;  // lanes of the widest vector of the instruction set

typedef float Lanes __attribute__((vector_size(4 * TL_WIDE)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * TL_WIDE)));
typedef int32_t LaneInts __attribute__((vector_size(4 * TL_WIDE)));
typedef uint16_t LaneHalves __attribute__((vector_size(2 * TL_WIDE)));

inline TL_INLINE LaneBits bits_of(Lanes x) { return reinterpret_cast<LaneBits>(x); }
inline TL_INLINE uint32_t bits_of(float x) { return tl_float_bits(x); }

inline TL_INLINE Lanes smaller(Lanes x, float bound) {
#if defined(__AVX512F__)
  return _mm512_min_ps(x, _mm512_set1_ps(bound));
#else
  return x > bound ? Lanes{} + bound : x;
#endif
}
inline TL_INLINE float smaller(float x, float bound) { return x > bound ? bound : x; }

template <class V>
inline TL_INLINE V copy_from(const void *from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline TL_INLINE Lanes widen(const float *from) { return copy_from<Lanes>(from); }

inline TL_INLINE Lanes widen(const tl_bf16 *from) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_cvtepu16_epi32(copy_from<__m256i>(from));
#elif defined(__AVX2__)
  const __m256i bits = _mm256_cvtepu16_epi32(copy_from<__m128i>(from));
#else
  const LaneBits bits = __builtin_convertvector(copy_from<LaneHalves>(from), LaneBits);
#endif
  return reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(bits) << 16);
}

inline TL_INLINE Lanes widen(const tl_f16 *from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(copy_from<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(copy_from<__m128i>(from));
#else
  Lanes x;
  for (int64_t j = 0; j < WIDE; ++j) x[j] = tl_load(from[j]);
  return x;
#endif
}

template <class V>
inline TL_INLINE void copy_to(void *to, V x) {
  std::memcpy(to, &x, sizeof x);
}

inline TL_INLINE void store(float *to, Lanes x) { copy_to(to, x); }

// As tl_store rounds: to nearest even, NaN stays NaN; where a machine has an instruction, subnormal numbers become 0.
inline TL_INLINE void store(tl_bf16 *to, Lanes x) {
#if defined(__AVX512BF16__)
  copy_to(to, _mm512_cvtneps_pbh(x));
#else
  const LaneBits bits = bits_of(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const LaneBits top = (x == x ? rounded : bits | 0x00400000u) >> 16;
#if defined(__AVX512F__)
  copy_to(to, _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(top)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32(reinterpret_cast<__m256i>(top), reinterpret_cast<__m256i>(top));
  copy_to(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  copy_to(to, __builtin_convertvector(top, LaneHalves));
#endif
#endif
}

inline TL_INLINE void store(tl_f16 *to, Lanes x) {
#if defined(__AVX512F__)
  copy_to(to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  copy_to(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t j = 0; j < WIDE; ++j) tl_store(&to[j], x[j]);
#endif
}

template <class T>
inline TL_INLINE void store(T *to, float x) {
  tl_store(to, x);
}

// One number or a vector of them, of any storage type, as V: float or Lanes.
template <class V, class T>
inline TL_INLINE V load(const T *from) {
  if constexpr (sizeof(V) == sizeof(float))
    return tl_load(*from);
  else
    return widen(from);
}

// Partial results that do not wait for each other: an addition takes several cycles.
constexpr int PARTS = 4;

// Calls body(kind, j, part) over a row: kind is Lanes{} for the elements from j to j + WIDE, float{} for element j.
template <class Body>
inline TL_INLINE void sweep(int64_t width, Body body) {
  int64_t j = 0;
  for (; j + PARTS * WIDE <= width; j += PARTS * WIDE) {
    body(Lanes{}, j, 0);
    body(Lanes{}, j + WIDE, 1);
    body(Lanes{}, j + 2 * WIDE, 2);
    body(Lanes{}, j + 3 * WIDE, 3);
  }
  for (; j + WIDE <= width; j += WIDE) body(Lanes{}, j, 0);
  for (; j < width; ++j) body(float{}, j, 0);
}

struct Sums {
  Lanes parts[PARTS] = {};
  float rest = 0.0f;
  TL_INLINE void add(Lanes x, int part) { parts[part] += x; }
  TL_INLINE void add(float x, int) { rest += x; }
  TL_INLINE float total() const {
    const Lanes all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(all) + rest;
#else
    float sum = rest;
    for (int64_t lane = 0; lane < WIDE; ++lane) sum += all[lane];
    return sum;
#endif
  }
};

// The largest magnitude. Magnitudes compare as their bits do, NaN above infinity: a NaN is passed on.
struct Largest {
  LaneInts parts[PARTS] = {};
  int32_t rest = 0;
  TL_INLINE void add(Lanes x, int part) {
    const LaneInts magnitude = reinterpret_cast<LaneInts>(bits_of(x) & 0x7fffffffu);
    parts[part] = magnitude > parts[part] ? magnitude : parts[part];
  }
  TL_INLINE void add(float x, int) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x) & 0x7fffffffu);
    rest = magnitude > rest ? magnitude : rest;
  }
  TL_INLINE float magnitude() {
    int32_t all = rest;
    for (int part = 1; part < PARTS; ++part) parts[0] = parts[part] > parts[0] ? parts[part] : parts[0];
    for (int64_t lane = 0; lane < WIDE; ++lane) all = parts[0][lane] > all ? parts[0][lane] : all;
    return tl_bits_float(static_cast<uint32_t>(all));
  }
};

}  // namespace
