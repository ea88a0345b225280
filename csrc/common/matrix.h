// Products of small matrices in bfloat16 and int8 with sums in fp32 and int32: the one inner loop of the frozen forward.
//
// Operands lie in tiles of 1024 bytes, the same on every instruction set, so that weights are laid out once and a saved
// layout serves every machine. A step is 64 bytes of a row: 32 bfloat16 or 64 int8 numbers.
//   left operand:   [16 rows][64 bytes], a row's numbers side by side;
//   right operand:  [16 groups][16 columns][4 bytes], a group being 2 bfloat16 or 4 int8 numbers of one column.
// Missing rows, columns and numbers are zeros. Denormal bfloat16 numbers may count as zero (AMX reads them so).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TILE_BYTES = 1024, TILE_SIDE = 16, STEP_BYTES = 64;

struct Bf16 {
  static constexpr int64_t step = 32;
  using Sum = float;
};
struct Int8 {
  static constexpr int64_t step = 64;
  using Sum = int32_t;
};

// Where the tiles of an operand are: tile (i, step) at first + i * tile_stride + step * step_stride bytes.
struct Tiles {
  const uint8_t *first;
  int64_t tile_stride, step_stride;
};

// 32 floats, rounded to nearest even.
static inline void round_step(tl_bf16 *to, const float *from) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
#else
#pragma omp simd
  for (int64_t j = 0; j < Bf16::step; ++j) tl_store(&to[j], from[j]);
#endif
}
static inline void store_step(tl_bf16 *to, const float *from) { round_step(to, from); }
template <class T>
static inline void store_step(T *to, const float *from) {
#pragma omp simd
  for (int64_t j = 0; j < Bf16::step; ++j) tl_store(&to[j], from[j]);
}

#if defined(__AMX_TILE__)

// 32 floats, each as the sum of three bfloat16 numbers, which hold all its bits; infinity and NaN stay in the first.
static inline void split_step(tl_bf16 *const planes[3], const float *from) {
  for (int64_t half = 0; half < 2; ++half) {
    __m512 rest = _mm512_loadu_ps(from + half * 16);
    const __mmask16 finite = _mm512_fpclass_ps_mask(rest, 0x99) ^ 0xffff;
    for (int64_t p = 0; p < 3; ++p) {
      const __m256i part = (__m256i)_mm512_cvtneps_pbh(rest);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(planes[p] + half * 16), part);
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
      rest = _mm512_maskz_sub_ps(finite, rest, value);
    }
  }
}

// Holds the tile registers, all of 16 rows of 64 bytes, for as long as it lives; a thread has at most one.
struct MatrixUnit {
  MatrixUnit() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = STEP_BYTES, config.rows[i] = TILE_SIDE;
    // The intrinsic says that it reads 8 bytes of it: without this the compiler may drop the rest.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit &) = delete;
  MatrixUnit &operator=(const MatrixUnit &) = delete;
};

// The intrinsics do not tell the compiler that they read memory.
static inline void finish_writes() { __asm__ volatile("" ::: "memory"); }

#define TL_TILE_PRODUCT(c, a, b)   \
  if constexpr (Type::step == 64) { \
    _tile_dpbssd(c, a, b);                      \
  } else {                                      \
    _tile_dpbf16ps(c, a, b);                    \
  }

// sums[16 Rows][16 Columns], row-major = sum over steps of left x right. row_sums is not needed here. meanwhile(step) is
// called after each step: what it does runs beside the products, which leave the vector units idle.
template <class Type, int Rows, int Columns, class Meanwhile>
static inline void multiply_tiles(typename Type::Sum *sums, Tiles left, Tiles right, int64_t steps, const int32_t *,
                                  Meanwhile meanwhile) {
  finish_writes();
  _tile_zero(0);
  if constexpr (Columns > 1) _tile_zero(1);
  if constexpr (Rows > 1) _tile_zero(2);
  if constexpr (Rows > 1 && Columns > 1) _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k) {
    const uint8_t *a = left.first + k * left.step_stride, *b = right.first + k * right.step_stride;
    _tile_loadd(6, b, STEP_BYTES);
    _tile_loadd(4, a, STEP_BYTES);
    TL_TILE_PRODUCT(0, 4, 6)
    if constexpr (Columns > 1) {
      _tile_loadd(7, b + right.tile_stride, STEP_BYTES);
      TL_TILE_PRODUCT(1, 4, 7)
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, a + left.tile_stride, STEP_BYTES);
      TL_TILE_PRODUCT(2, 5, 6)
    }
    if constexpr (Rows > 1 && Columns > 1) { TL_TILE_PRODUCT(3, 5, 7) }
    meanwhile(k);
  }
  constexpr int64_t row_bytes = 4 * TILE_SIDE * Columns;
  _tile_stored(0, sums, row_bytes);
  if constexpr (Columns > 1) _tile_stored(1, sums + TILE_SIDE, row_bytes);
  if constexpr (Rows > 1) _tile_stored(2, sums + TILE_SIDE * TILE_SIDE * Columns, row_bytes);
  if constexpr (Rows > 1 && Columns > 1) _tile_stored(3, sums + TILE_SIDE * TILE_SIDE * Columns + TILE_SIDE, row_bytes);
}

// Products of one plane of the left operand with one of the right, into the same sums; loads only what changes.
template <int Rows, bool LoadLeft, bool LoadRight>
static inline void add_tile_products(const uint8_t *a, int64_t a_tile_stride, const uint8_t *b) {
  if constexpr (LoadRight) _tile_loadd(6, b, STEP_BYTES);
  if constexpr (LoadLeft) _tile_loadd(4, a, STEP_BYTES);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (LoadRight) _tile_loadd(7, b + TILE_BYTES, STEP_BYTES);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Rows > 1) {
    if constexpr (LoadLeft) _tile_loadd(5, a + a_tile_stride, STEP_BYTES);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums [32][32] of a matrix to tiles 0 to 3, or zeros; and back.
static inline void load_sums(const float *c, int64_t stride, bool there) {
  finish_writes();
  if (!there) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  const float *lower = c + TILE_SIDE * stride;
  _tile_loadd(0, c, stride * 4);
  _tile_loadd(1, c + TILE_SIDE, stride * 4);
  _tile_loadd(2, lower, stride * 4);
  _tile_loadd(3, lower + TILE_SIDE, stride * 4);
}
static inline void store_sums(float *c, int64_t stride) {
  float *lower = c + TILE_SIDE * stride;
  _tile_stored(0, c, stride * 4);
  _tile_stored(1, c + TILE_SIDE, stride * 4);
  _tile_stored(2, lower, stride * 4);
  _tile_stored(3, lower + TILE_SIDE, stride * 4);
}

// Adds to the sums in tiles 0 to 3 the products of operands in three planes each: the six that reach float32's last bit,
// the smallest first where that costs no load.
template <int Rows>
static inline void add_split_products(Tiles left, int64_t left_plane, Tiles right, int64_t right_plane, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    const uint8_t *a = left.first + k * left.step_stride, *b = right.first + k * right.step_stride;
    add_tile_products<Rows, true, true>(a + 2 * left_plane, left.tile_stride, b);
    add_tile_products<Rows, true, false>(a + left_plane, left.tile_stride, b);
    add_tile_products<Rows, false, true>(a + left_plane, left.tile_stride, b + right_plane);
    add_tile_products<Rows, true, false>(a, left.tile_stride, b + right_plane);
    add_tile_products<Rows, false, true>(a, left.tile_stride, b + 2 * right_plane);
    add_tile_products<Rows, false, true>(a, left.tile_stride, b);
  }
}

// sums[16 Rows][32] of such operands; `more`: added to what is there.
template <int Rows>
static inline void multiply_split_tiles(float *sums, Tiles left, int64_t left_plane, Tiles right, int64_t right_plane,
                                        int64_t steps, bool more = false) {
  finish_writes();
  if (more) {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + TILE_SIDE, 128);
    if constexpr (Rows > 1) {
      _tile_loadd(2, sums + 32 * TILE_SIDE, 128);
      _tile_loadd(3, sums + 33 * TILE_SIDE, 128);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Rows > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  add_split_products<Rows>(left, left_plane, right, right_plane, steps);
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + TILE_SIDE, 128);
  if constexpr (Rows > 1) {
    _tile_stored(2, sums + 32 * TILE_SIDE, 128);
    _tile_stored(3, sums + 33 * TILE_SIDE, 128);
  }
}

#else

struct MatrixUnit {};

#if defined(__AVX512BF16__)

constexpr int ROWS_AT_ONCE = 8;
typedef __m512 Bf16Sums;
typedef __m512i Int8Sums;

static inline Bf16Sums add_products(Bf16Sums sum, uint32_t a, const uint8_t *b, Bf16) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)_mm512_loadu_si512(b));
}
// The instruction takes its first operand unsigned: the right one, raised by 128, which `start` takes back.
static inline Int8Sums add_products(Int8Sums sum, uint32_t a, const uint8_t *b, Int8) {
  const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(b), _mm512_set1_epi8(-128));
  return _mm512_dpbusd_epi32(sum, raised, _mm512_set1_epi32(static_cast<int>(a)));
}
static inline Bf16Sums start(const int32_t *, int64_t, Bf16) { return _mm512_setzero_ps(); }
static inline Int8Sums start(const int32_t *row_sums, int64_t row, Int8) {
  return _mm512_set1_epi32(-128 * row_sums[row]);
}
static inline void put(float *to, Bf16Sums sum) { _mm512_storeu_ps(to, sum); }
static inline void put(int32_t *to, Int8Sums sum) { _mm512_storeu_si512(to, sum); }

#else

constexpr int ROWS_AT_ONCE = 2;
typedef float Bf16Sums __attribute__((vector_size(64)));
typedef int32_t Int8Sums __attribute__((vector_size(64)));
typedef uint32_t Groups __attribute__((vector_size(64)));

static inline Groups groups_at(const uint8_t *from) {
  Groups groups;
  std::memcpy(&groups, from, sizeof groups);
  return groups;
}
static inline float bf16_number(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}
static inline Bf16Sums add_products(Bf16Sums sum, uint32_t a, const uint8_t *b, Bf16) {
  const Groups groups = groups_at(b);
  sum += bf16_number(a << 16) * (Bf16Sums)(groups << 16);
  return sum + bf16_number(a & 0xffff0000u) * (Bf16Sums)(groups & 0xffff0000u);
}
static inline Int8Sums add_products(Int8Sums sum, uint32_t a, const uint8_t *b, Int8) {
  const Int8Sums groups = (Int8Sums)groups_at(b);
#pragma GCC unroll 4
  for (int shift = 24; shift >= 0; shift -= 8)
    sum += ((groups << shift) >> 24) * (static_cast<int32_t>(a << shift) >> 24);
  return sum;
}
static inline Bf16Sums start(const int32_t *, int64_t, Bf16) { return Bf16Sums{}; }
static inline Int8Sums start(const int32_t *, int64_t, Int8) { return Int8Sums{}; }
template <class Sum, class Vector>
static inline void put(Sum *to, Vector sum) {
  std::memcpy(to, &sum, sizeof sum);
}

#endif

// sums[16 Rows][16 Columns], row-major = sum over steps of left x right. row_sums: of the left operand's int8 rows.
// meanwhile(step) is called for each step, before the products: the vector units have no other work to do beside them.
template <class Type, int Rows, int Columns, class Meanwhile>
static inline void multiply_tiles(typename Type::Sum *sums, Tiles left, Tiles right, int64_t steps,
                                  const int32_t *row_sums, Meanwhile meanwhile) {
  for (int64_t k = 0; k < steps; ++k) meanwhile(k);
  using Vector = decltype(start(row_sums, 0, Type{}));
  for (int64_t first = 0; first < Rows * TILE_SIDE; first += ROWS_AT_ONCE) {
    Vector sum[ROWS_AT_ONCE][Columns];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
      for (int c = 0; c < Columns; ++c) sum[r][c] = start(row_sums, first + r, Type{});
    const uint8_t *rows = left.first + first / TILE_SIDE * left.tile_stride + first % TILE_SIDE * STEP_BYTES;
    for (int64_t k = 0; k < steps; ++k) {
      const uint8_t *a = rows + k * left.step_stride, *b = right.first + k * right.step_stride;
      for (int64_t group = 0; group < 16; ++group) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS_AT_ONCE; ++r) {
          uint32_t numbers;
          std::memcpy(&numbers, a + r * STEP_BYTES + group * 4, sizeof numbers);
#pragma GCC unroll 2
          for (int c = 0; c < Columns; ++c)
            sum[r][c] = add_products(sum[r][c], numbers, b + c * right.tile_stride + group * STEP_BYTES, Type{});
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < Columns; ++c) put(sums + ((first + r) * Columns + c) * TILE_SIDE, sum[r][c]);
  }
}

#endif

template <class Type, int Rows, int Columns>
static inline void multiply_tiles(typename Type::Sum *sums, Tiles left, Tiles right, int64_t steps,
                                  const int32_t *row_sums) {
  multiply_tiles<Type, Rows, Columns>(sums, left, right, steps, row_sums, [](int64_t) {});
}

}  // namespace
