// Frozen linear layers in float32. W stays where the model has it and as it has it: a group of panels is laid out at a
// time, and all rows are run past it.
//
// On AMX each number is split into a sum of three bfloat16 numbers, which holds all its 24 bits, and of the nine products
// the six that reach float32's last bit are summed. On AVX-512 the products are float32's own.
#include "isa.h"
#include "linear.h"
#include "tile.h"

namespace TL_ISA {

#if defined(__AVX512F__)

// Where the outputs of a panel have their inputs; null for those that only fill it up.
struct PanelRows {
  const float *rows[PANEL];
  int64_t row_stride, column_stride;

  PanelRows(const tl_shared_weight &weight, bool gated, int64_t panel)
      : row_stride(weight.row_stride), column_stride(weight.column_stride) {
    int64_t part = 0, first = panel * PANEL;
    for (; !gated && part < 2; ++part) {
      const int64_t filled = parts(weight.outputs[part], PANEL) * PANEL;
      if (first < filled) break;
      first -= filled;
    }
    for (int64_t n = 0; n < PANEL; ++n) {
      const int64_t from = gated ? n / TILE_SIDE : part;
      const int64_t row = gated ? panel * TILE_SIDE + n % TILE_SIDE : first + n;
      rows[n] = row < weight.outputs[from] ? weight.parts[from] + row * row_stride : nullptr;
    }
  }

  // to[n][j] = the inputs first + j of the outputs at + n, 16 x Count, zeros where there is none.
  template <int64_t Count>
  void read(float (*to)[Count], int64_t at, int64_t first, int64_t inputs) const {
    const int64_t count = std::min(Count, inputs - first);
    const bool whole = count == Count && rows[at + TILE_SIDE - 1] != nullptr;
    if (whole && column_stride == 1) {
      for (int64_t n = 0; n < TILE_SIDE; ++n) std::memcpy(to[n], rows[at + n] + first, sizeof to[n]);
    } else {  // inputs outside: in a transposed weight the outputs lie side by side
      std::memset(to, 0, sizeof(float) * TILE_SIDE * Count);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t n = 0; n < TILE_SIDE && rows[at + n] != nullptr; ++n)
          to[n][j] = rows[at + n][(first + j) * column_stride];
    }
  }
};

#if defined(__AMX_TILE__)

// Products of numbers in three planes of bfloat16.
struct Products {
  static constexpr int64_t PLANES = 3, INPUTS_AT_ONCE = 24 * Bf16::step;
  const Left &left;
  const MatrixUnit unit{};

  static int64_t panel_bytes(int64_t inputs) { return PLANES * parts(inputs, Bf16::step) * 2 * TILE_BYTES; }

  // To [plane][step][2 tiles][1024 bytes].
  static void lay_out(const PanelRows &rows, int64_t first, int64_t count, int64_t inputs, uint8_t *to) {
    const int64_t steps = parts(count, Bf16::step), plane_bytes = steps * 2 * TILE_BYTES;
    float numbers[TILE_SIDE][Bf16::step];
    for (int64_t tile = 0; tile < 2 * steps; ++tile, to += TILE_BYTES) {
      rows.read(numbers, tile % 2 * TILE_SIDE, first + tile / 2 * Bf16::step, inputs);
      for (int64_t n = 0; n < TILE_SIDE; ++n) {
        tl_bf16 *planes[PLANES];
        for (int64_t p = 0; p < PLANES; ++p)
          planes[p] = reinterpret_cast<tl_bf16 *>(to + p * plane_bytes + n * STEP_BYTES);
        split_step(planes, numbers[n]);
      }
      for (int64_t p = 0; p < PLANES; ++p) transpose(reinterpret_cast<float *>(to + p * plane_bytes));
    }
  }

  // sums of a strip and a panel; adds to what is there where the inputs are not the first.
  void multiply(float *sums, const Layer &layer, int64_t tile, int64_t first, int64_t count, const uint8_t *panel) const {
    const int64_t steps = parts(count, Bf16::step), plane_bytes = steps * 2 * TILE_BYTES;
    const Tiles a{left.tile(tile, first / Bf16::step), left.steps * TILE_BYTES, TILE_BYTES};
    const Tiles b{panel, TILE_BYTES, 2 * TILE_BYTES};
    if (tile + 1 < layer.row_tiles())
      multiply_split_tiles<2>(sums, a, left.plane_bytes, b, plane_bytes, steps, first > 0);
    else
      multiply_split_tiles<1>(sums, a, left.plane_bytes, b, plane_bytes, steps, first > 0);
  }
};

#else

struct Products {
  static constexpr int64_t INPUTS_AT_ONCE = 128, ROWS_AT_ONCE = 8;  // a block of x and one of W fit the L1 cache
  const Left &left;

  static int64_t panel_bytes(int64_t inputs) { return 4 * PANEL * inputs; }

  // To [input][32 outputs].
  static void lay_out(const PanelRows &rows, int64_t first, int64_t count, int64_t inputs, uint8_t *to) {
    auto *numbers = reinterpret_cast<float *>(to);
    float tile[TILE_SIDE][TILE_SIDE];
    for (int64_t j = 0; j < count; j += TILE_SIDE)
      for (int64_t half = 0; half < PANEL; half += TILE_SIDE) {
        rows.read(tile, half, first + j, inputs);
        transpose(tile[0]);
        for (int64_t k = 0; k < std::min(TILE_SIDE, count - j); ++k)
          std::memcpy(numbers + (j + k) * PANEL + half, tile[k], sizeof tile[k]);
      }
  }

  void multiply(float *sums, const Layer &layer, int64_t tile, int64_t first, int64_t count, const uint8_t *panel) const {
    for (int64_t i = 0; i < STRIP; i += ROWS_AT_ONCE) {
      const float *x[ROWS_AT_ONCE];
      for (int64_t r = 0; r < ROWS_AT_ONCE; ++r)  // rows that are not there give sums that nothing reads
        x[r] = static_cast<const float *>(layer.x) + std::min(tile * TILE_SIDE + i + r, layer.rows - 1) * layer.x_stride + first;
      multiply_rows(sums + i * PANEL, x, reinterpret_cast<const float *>(panel), count, first > 0);
    }
  }

  static void multiply_rows(float *sums, const float *const *x, const float *panel, int64_t count, bool more) {
    Vector low[ROWS_AT_ONCE] = {}, high[ROWS_AT_ONCE] = {};
    for (int64_t k = 0; k < count; ++k) {
      const Vector a = load(panel + k * PANEL), b = load(panel + k * PANEL + LANES);
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
        const Vector number = splat(x[r][k]);
        low[r] += number * a;
        high[r] += number * b;
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r, sums += PANEL) {
      store(sums, more ? load(sums) + low[r] : low[r]);
      store(sums + LANES, more ? load(sums + LANES) + high[r] : high[r]);
    }
  }
};

#endif

static int multiply(const Layer &layer, const tl_shared_weight &weight, const Left &left) {
  const FinishRows finish = finish_of<float, Scales::None>(layer.activation);
  if (finish == nullptr) return TL_BAD_ARGUMENT;
  const int64_t block = std::min(Products::INPUTS_AT_ONCE, layer.inputs), panel_bytes = Products::panel_bytes(block);
  const Deal deal(layer, panel_bytes);
  // with more blocks of inputs than one the sums wait for the last
  const int64_t waiting = layer.inputs > block ? deal.chunk_strips * deal.group_panels : 1;
  std::atomic<bool> failed{false};
  parallel_for(deal.groups * deal.row_chunks, layer.threads, [&](int64_t task) {
    const int64_t first_panel = task / deal.row_chunks * deal.group_panels;
    const int64_t last_panel = std::min(layer.panels(), first_panel + deal.group_panels);
    const int64_t first_tile = task % deal.row_chunks * deal.chunk_strips * 2;
    const int64_t last_tile = std::min(layer.row_tiles(), first_tile + deal.chunk_strips * 2);
    uint8_t *panels = kept_scratch<2>(panel_bytes * deal.group_panels + 4 * STRIP * PANEL * waiting);
    if (panels == nullptr) return failed.store(true);
    auto *sums = reinterpret_cast<float *>(panels + panel_bytes * deal.group_panels);
    const Products products{left};
    for (int64_t first = 0; first < layer.inputs; first += block) {
      const int64_t count = std::min(block, layer.inputs - first);
      for (int64_t p = first_panel; p < last_panel; ++p)
        Products::lay_out(PanelRows(weight, layer.gated, p), first, count, layer.inputs,
                          panels + (p - first_panel) * panel_bytes);
      float *place = sums;
      for (int64_t tile = first_tile; tile < last_tile; tile += 2)
        for (int64_t p = first_panel; p < last_panel; ++p) {
          products.multiply(place, layer, tile, first, count, panels + (p - first_panel) * panel_bytes);
          if (first + count == layer.inputs) {
            Finish finishing = finish_block(layer, left, place, tile * TILE_SIDE, p, Scales::None);
            finish_all(finishing, finish);
          }
          if (waiting > 1) place += STRIP * PANEL;
        }
    }
  });
  return failed ? tl_fail(TL_OUT_OF_MEMORY, "linear: no memory for a weight's panels") : TL_OK;
}

#endif

int tl_linear_fp32_cpu(const float *x, const tl_shared_weight *weight, const float *bias, float *y, int64_t rows,
                       int64_t inputs, int64_t outputs, int64_t x_stride, int64_t y_stride, int activation, int gated,
                       int threads) {
#if defined(__AVX512F__)
  if (rows == 0 || outputs == 0) return TL_OK;
  if (inputs <= 0) return tl_fail(TL_BAD_ARGUMENT, "linear: %lld inputs", (long long)inputs);
  const Layer layer{x,       weight,   nullptr,  nullptr, nullptr, bias,       y,          rows,   inputs,
                    outputs, x_stride, y_stride, TL_F32,  TL_F32,  activation, gated != 0, threads};
#if defined(__AMX_TILE__)
  return with_rows<Rows::Split>(layer, [&](const Left &left) { return multiply(layer, *weight, left); });
#else
  return multiply(layer, *weight, Left{});
#endif
#else
  return tl_fail(TL_BAD_ARGUMENT, "linear in float32 needs AVX-512; use PyTorch's here");
#endif
}

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_linear_fp32_cpu,
                (const float *x, const tl_shared_weight *weight, const float *bias, float *y, int64_t rows,
                 int64_t inputs, int64_t outputs, int64_t x_stride, int64_t y_stride, int activation, int gated,
                 int threads),
                (x, weight, bias, y, rows, inputs, outputs, x_stride, y_stride, activation, gated, threads))
