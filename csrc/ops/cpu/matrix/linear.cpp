// Frozen linear layers whose products run in bfloat16 or int8: weights in bf16, int8 and nf4.
#include "isa.h"
#include "linear.h"
#include "linear_pair.h"

namespace TL_ISA {

// ---- panels of W as right tiles: [step][2 tiles][1024 bytes] ----

template <Scales Kind>
struct InPlace {  // bf16 and int8 lie in memory as they are read
  static constexpr Scales scales = Kind;
  static constexpr int64_t scratch_bytes(int64_t) { return 0; }
  static constexpr int64_t stored_bytes(int64_t steps) { return steps * 2 * TILE_BYTES; }
  static const uint8_t *panel(const Layer &layer, int64_t panel, int64_t steps, uint8_t *) {
    return static_cast<const uint8_t *>(layer.weight) + panel * steps * 2 * TILE_BYTES;
  }
};

static constexpr float NF4[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};

struct FourBit {  // [step][2 tiles][16 groups][16 columns] bytes, the first of the two numbers in the low half
  static constexpr Scales scales = Scales::None;
  static constexpr int64_t scratch_bytes(int64_t steps) { return steps * 2 * TILE_BYTES; }
  static constexpr int64_t stored_bytes(int64_t steps) { return steps * 512; }
  static const uint8_t *panel(const Layer &layer, int64_t panel, int64_t steps, uint8_t *to) {
    const auto *codes = static_cast<const uint8_t *>(layer.weight) + panel * steps * 512;
    const uint8_t *group_scale = layer.group_scale + panel * parts(steps, 2) * PANEL;
    float scale[PANEL];
    for (int64_t tile = 0; tile < 2 * steps; ++tile) {
      if (tile % 4 == 0) {
#pragma omp simd
        for (int64_t n = 0; n < PANEL; ++n)
          scale[n] = layer.scale[panel * PANEL + n] * (group_scale[tile / 4 * PANEL + n] / 255.0f);
      }
      for (int64_t group = 0; group < 16; ++group)
        unpack(codes + tile * 256 + group * 16, scale + tile % 2 * TILE_SIDE, to + tile * TILE_BYTES + group * 64);
    }
    return to;
  }
  static inline void unpack(const uint8_t *codes, const float *scale, uint8_t *to) {
#if defined(__AVX512BF16__)
    const __m512 table = _mm512_loadu_ps(NF4), factor = _mm512_loadu_ps(scale);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
    const __m512 low = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, table), factor);
    const __m512 high = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), factor);
    const __m512i low_bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i high_bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high)), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(low_bits, high_bits));
#else
    auto *numbers = reinterpret_cast<tl_bf16 *>(to);
    for (int64_t n = 0; n < TILE_SIDE; ++n) {
      tl_store(&numbers[2 * n], NF4[codes[n] & 15] * scale[n]);
      tl_store(&numbers[2 * n + 1], NF4[codes[n] >> 4] * scale[n]);
    }
#endif
  }
};

// int8 as it is stored for int8 products, [step of 64][2 tiles][16 groups of 4][16 columns][4], to two steps of bf16. The
// numbers are whole in bf16: their scale waits for the sums.
struct EightBit {
  static constexpr Scales scales = Scales::OfOutputs;
  static constexpr int64_t scratch_bytes(int64_t steps) { return parts(steps, 2) * 4 * TILE_BYTES; }
  static constexpr int64_t stored_bytes(int64_t steps) { return parts(steps, 2) * 2 * TILE_BYTES; }
  static const uint8_t *panel(const Layer &layer, int64_t panel, int64_t steps, uint8_t *to) {
    const int64_t wide_steps = parts(steps, 2);
    const auto *values = static_cast<const uint8_t *>(layer.weight) + panel * wide_steps * 2 * TILE_BYTES;
    for (int64_t tile = 0; tile < 2 * wide_steps; ++tile)
      for (int64_t group = 0; group < 16; ++group) {
        const int64_t step = tile / 2 * 2 + group / 8, pair = group % 8 * 2;
        unpack(values + tile * TILE_BYTES + group * STEP_BYTES, to + (step * 2 + tile % 2) * TILE_BYTES + pair * STEP_BYTES);
      }
    return to;
  }
  // Four numbers of each of 16 columns to two groups of two.
  static TL_INLINE void unpack(const uint8_t *values, uint8_t *to) {
    for (int64_t half = 0; half < 2; ++half) {
      uint32_t pairs[TILE_SIDE];
#pragma omp simd
      for (int64_t n = 0; n < TILE_SIDE; ++n) {
        uint32_t four;
        std::memcpy(&four, values + 4 * n, sizeof four);
        const auto first = static_cast<int32_t>(four << (24 - 16 * half)) >> 24;
        const auto second = static_cast<int32_t>(four << (16 - 16 * half)) >> 24;
        pairs[n] = tl_float_bits(static_cast<float>(first)) >> 16 | tl_float_bits(static_cast<float>(second));
      }
      std::memcpy(to + half * STEP_BYTES, pairs, sizeof pairs);
    }
  }
};

// Sends for memory that is needed soon, some lines at a time.
class Ahead {
 public:
  Ahead(const uint8_t *from, const uint8_t *end) : at_(from), end_(end) {}
  TL_INLINE void advance(int64_t lines) {
    for (; lines > 0 && at_ < end_; --lines, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const uint8_t *at_, *end_;
};

template <class Type, class Meanwhile>
static inline void multiply_strip(typename Type::Sum *sums, const Left &left, int64_t row_tile, int64_t row_tiles,
                                  const uint8_t *panel, Meanwhile meanwhile) {
  const Tiles a{left.tile(row_tile, 0), left.steps * TILE_BYTES, TILE_BYTES}, b{panel, TILE_BYTES, 2 * TILE_BYTES};
  const int32_t *row_sums = left.sums == nullptr ? nullptr : left.sums + row_tile * TILE_SIDE;
  if (row_tile + 1 < row_tiles)
    multiply_tiles<Type, 2, 2>(sums, a, b, left.steps, row_sums, meanwhile);
  else
    multiply_tiles<Type, 1, 2>(sums, a, b, left.steps, row_sums, meanwhile);
}

template <class Type, class Panels>
static int run(const Layer &layer, const Left &left) {
  FinishRows finish_rows = nullptr;
  if (int status = with_layer_dtype(layer.y_dtype, [&](auto y) {
        finish_rows = finish_of<decltype(y), Panels::scales>(layer.activation);
        return static_cast<int>(finish_rows == nullptr ? TL_BAD_ARGUMENT : TL_OK);
      }))
    return status;
  using Sum = typename Type::Sum;
  const int64_t panel_bytes = left.steps * 2 * TILE_BYTES;
  const Deal deal(layer, panel_bytes);
  std::atomic<bool> failed{false};
  parallel_for(deal.groups * deal.row_chunks, layer.threads, [&](int64_t task) {
    const int64_t first_panel = task / deal.row_chunks * deal.group_panels;
    const int64_t last_panel = std::min(layer.panels(), first_panel + deal.group_panels);
    const int64_t first_tile = task % deal.row_chunks * deal.chunk_strips * 2;
    const int64_t last_tile = std::min(layer.row_tiles(), first_tile + deal.chunk_strips * 2);
    const int64_t scratch_bytes = Panels::scratch_bytes(left.steps);
    uint8_t *scratch = kept_scratch<2>(64 + scratch_bytes * (last_panel - first_panel));
    if (scratch == nullptr) return failed.store(true);
    const uint8_t *panels[GROUP_BYTES / (2 * TILE_BYTES)];
    for (int64_t p = first_panel; p < last_panel; ++p)
      panels[p - first_panel] = Panels::panel(layer, p, left.steps, scratch + (p - first_panel) * scratch_bytes);
    // what this thread probably reads next
    const int64_t stored = Panels::stored_bytes(left.steps), next = first_panel + layer.threads * deal.group_panels;
    const auto *weight = static_cast<const uint8_t *>(layer.weight);
    Ahead ahead(weight + std::min(next, layer.panels()) * stored,
                weight + std::min(next + deal.group_panels, layer.panels()) * stored);
    const int64_t strips = parts(last_tile - first_tile, 2), lines = parts(parts(stored, 64), left.steps * strips);
    const int64_t pause = std::max<int64_t>(1, left.steps * Finish::ROWS_AT_ONCE / STRIP);
    [[maybe_unused]] const MatrixUnit unit;
    alignas(64) Sum sums[2][STRIP * PANEL];
    Finish finishing;
    int turn = 0;
    for (int64_t tile = first_tile; tile < last_tile; tile += 2)
      for (int64_t p = first_panel; p < last_panel; ++p, turn ^= 1) {
        multiply_strip<Type>(sums[turn], left, tile, layer.row_tiles(), panels[p - first_panel],
                             [&, due = int64_t{1}](int64_t) mutable TL_INLINE {
                               ahead.advance(lines);
                               if (--due > 0) return;
                               finish_rows(finishing);
                               due = pause;
                             });
        finish_all(finishing, finish_rows);
        finishing = finish_block(layer, left, sums[turn], tile * TILE_SIDE, p, Panels::scales);
      }
    finish_all(finishing, finish_rows);
  });
  return failed ? tl_fail(TL_OUT_OF_MEMORY, "linear: no memory for unpacked weights") : TL_OK;
}

static int multiply(const Layer &layer, int format) {
  if (layer.rows == 0 || layer.outputs == 0) return TL_OK;
  if (layer.inputs <= 0) return tl_fail(TL_BAD_ARGUMENT, "linear: %lld inputs", (long long)layer.inputs);
  switch (format) {
    case TL_WEIGHT_BF16:
      return with_rows<Rows::Rounded>(layer, [&](const Left &left) { return run<Bf16, InPlace<Scales::None>>(layer, left); });
    case TL_WEIGHT_INT8:
      return with_rows<Rows::Quantised>(layer, [&](const Left &left) { return run<Int8, InPlace<Scales::OfRowsAndOutputs>>(layer, left); });
    case TL_WEIGHT_NF4:
      return with_rows<Rows::Rounded>(layer, [&](const Left &left) { return run<Bf16, FourBit>(layer, left); });
    case TL_WEIGHT_INT8_ONLY:
      return with_rows<Rows::Rounded>(layer, [&](const Left &left) { return run<Bf16, EightBit>(layer, left); });
    default:
      return tl_fail(TL_BAD_ARGUMENT, "unknown weight format code %d", format);
  }
}

int tl_linear_cpu(const void *x, const void *weight, const float *scale, const uint8_t *group_scale,
                  const float *smooth, const float *bias, void *y, int64_t rows, int64_t inputs, int64_t outputs,
                  int64_t x_stride, int64_t y_stride, int x_dtype, int y_dtype, int format, int activation, int gated,
                  int threads) {
  const Layer layer{x,        weight,   scale,   group_scale, smooth,  bias,       y,          rows,   inputs,
                    outputs,  x_stride, y_stride, x_dtype,    y_dtype, activation, gated != 0, threads};
  return multiply(layer, format);
}

int linear_pair(const tl_linear &first, const tl_linear &second, const void *x, void *between, void *y, int64_t rows,
                int activation, int threads) {
  const auto layer = [&](const tl_linear &of, const void *from, void *to, int what) {
    return Layer{from,       of.weight, of.scale,   of.group_scale, of.smooth, of.bias, to,   rows,          of.inputs,
                 of.outputs, of.inputs, of.outputs, TL_BF16,        TL_BF16,   what,    of.gated != 0, threads};
  };
  Layer up = layer(first, x, between, activation), down = layer(second, between, y, TL_NO_ACTIVATION);
  up.y_in_tiles = down.x_in_tiles =
      second.format != TL_WEIGHT_INT8 && second.smooth == nullptr && second.inputs % Bf16::step == 0;
  if (first.gated) up.y_stride /= 2;
  if (int status = multiply(up, static_cast<int>(first.format))) return status;
  return multiply(down, static_cast<int>(second.format));
}

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_linear_cpu,
                (const void *x, const void *weight, const float *scale, const uint8_t *group_scale, const float *smooth,
                 const float *bias, void *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t x_stride,
                 int64_t y_stride, int x_dtype, int y_dtype, int format, int activation, int gated, int threads),
                (x, weight, scale, group_scale, smooth, bias, y, rows, inputs, outputs, x_stride, y_stride, x_dtype,
                 y_dtype, format, activation, gated, threads))
