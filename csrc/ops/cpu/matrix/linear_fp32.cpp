// Frozen linear layers in float32 on AMX: each number is split into a sum of three bfloat16 numbers, which holds all its
// 24 bits, and of the nine products the six that reach float32's last bit are summed. W stays as the model has it
// (row-major, shared); a group of panels is split at a time.
#include "isa.h"
#include "linear.h"
#include "tile.h"

namespace TL_ISA {

#if defined(__AMX_TILE__)

static constexpr int64_t PLANES = 3;
static constexpr int64_t BLOCK_STEPS = 24;  // a panel's inputs are multiplied so many at a time, the sums wait in y

// Panel of W, steps [first_step, first_step + steps), to [plane][step][2 tiles][1024 bytes].
static void split_panel(const Layer &layer, int64_t weight_stride, int64_t panel, int64_t first_step, int64_t steps,
                        uint8_t *to) {
  const int64_t plane_bytes = steps * 2 * TILE_BYTES;
  for (int64_t tile = 0; tile < 2 * steps; ++tile) {
    const int64_t first = (first_step + tile / 2) * Bf16::step, count = std::min(Bf16::step, layer.inputs - first);
    for (int64_t n = 0; n < TILE_SIDE; ++n) {
      const int64_t row = panel * PANEL + tile % 2 * TILE_SIDE + n;
      const float *from = static_cast<const float *>(layer.weight) + row * weight_stride + first;
      float numbers[Bf16::step];
      if (row >= layer.outputs || count < Bf16::step) {
        for (int64_t j = 0; j < Bf16::step; ++j) numbers[j] = row < layer.outputs && j < count ? from[j] : 0.0f;
        from = numbers;
      }
      tl_bf16 *planes[PLANES];
      for (int64_t p = 0; p < PLANES; ++p)
        planes[p] = reinterpret_cast<tl_bf16 *>(to + p * plane_bytes + tile * TILE_BYTES + n * STEP_BYTES);
      split_step(planes, from);
    }
    for (int64_t p = 0; p < PLANES; ++p) transpose(reinterpret_cast<float *>(to + p * plane_bytes + tile * TILE_BYTES));
  }
}

// sums and y hold 32 columns of a row; earlier blocks of inputs left theirs in y.
static inline void add_earlier(float *sums, const Layer &layer, int64_t first, int64_t panel) {
  const int64_t count = std::min(PANEL, layer.outputs - panel * PANEL), rows = std::min(STRIP, layer.rows - first);
  for (int64_t i = 0; i < rows; ++i) {
    const float *y = static_cast<const float *>(layer.y) + (first + i) * layer.y_stride + panel * PANEL;
    for (int64_t j = 0; j < count; ++j) sums[i * PANEL + j] += y[j];
  }
}

static int multiply_split(const Layer &layer, int64_t weight_stride, const Left &left) {
  const FinishRows activated = finish_of<float, Scales::None>(layer.activation);
  if (activated == nullptr) return TL_BAD_ARGUMENT;
  const int64_t block_steps = std::min(BLOCK_STEPS, left.steps);
  const int64_t panel_bytes = PLANES * block_steps * 2 * TILE_BYTES;
  const Deal deal(layer, panel_bytes);
  Layer unfinished = layer;
  unfinished.bias = nullptr;
  std::atomic<bool> failed{false};
  parallel_for(deal.groups * deal.row_chunks, layer.threads, [&](int64_t task) {
    const int64_t first_panel = task / deal.row_chunks * deal.group_panels;
    const int64_t last_panel = std::min(layer.panels(), first_panel + deal.group_panels);
    const int64_t first_tile = task % deal.row_chunks * deal.chunk_strips * 2;
    const int64_t last_tile = std::min(layer.row_tiles(), first_tile + deal.chunk_strips * 2);
    uint8_t *panels = kept_scratch<2>(panel_bytes * (last_panel - first_panel));
    if (panels == nullptr) return failed.store(true);
    const MatrixUnit unit;
    alignas(64) float sums[STRIP * PANEL];
    for (int64_t step = 0; step < left.steps; step += block_steps) {
      const int64_t steps = std::min(block_steps, left.steps - step);
      const bool last = step + steps == left.steps;
      for (int64_t p = first_panel; p < last_panel; ++p)
        split_panel(layer, weight_stride, p, step, steps, panels + (p - first_panel) * panel_bytes);
      for (int64_t tile = first_tile; tile < last_tile; tile += 2)
        for (int64_t p = first_panel; p < last_panel; ++p) {
          const Tiles a{left.tile(tile, step), left.steps * TILE_BYTES, TILE_BYTES};
          const Tiles b{panels + (p - first_panel) * panel_bytes, TILE_BYTES, 2 * TILE_BYTES};
          if (tile + 1 < layer.row_tiles())
            multiply_split_tiles<2>(sums, a, left.plane_bytes, b, steps * 2 * TILE_BYTES, steps);
          else
            multiply_split_tiles<1>(sums, a, left.plane_bytes, b, steps * 2 * TILE_BYTES, steps);
          if (step > 0) add_earlier(sums, layer, tile * TILE_SIDE, p);
          Finish block = finish_block(last ? layer : unfinished, left, sums, tile * TILE_SIDE, p, Scales::None);
          finish_all(block, last ? activated : finish_rows<TL_NO_ACTIVATION, float, Scales::None>);
        }
    }
  });
  return failed ? tl_fail(TL_OUT_OF_MEMORY, "linear: no memory for split weights") : TL_OK;
}

#endif

int tl_linear_fp32_cpu(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int64_t inputs,
                       int64_t outputs, int64_t x_stride, int64_t weight_stride, int64_t y_stride, int activation,
                       int threads) {
#if defined(__AMX_TILE__)
  if (rows == 0 || outputs == 0) return TL_OK;
  const Layer layer{x,       weight,   nullptr, nullptr, nullptr, bias,       y,     rows,   inputs,
                    outputs, x_stride, y_stride, TL_F32,  TL_F32,  activation, false, threads};
  return with_rows<Rows::Split>(layer, [&](const Left &left) {
    return multiply_split(layer, weight_stride, left);
  });
#else
  return tl_fail(TL_BAD_ARGUMENT, "linear in float32 runs on AMX alone; use PyTorch's here");
#endif
}

}  // namespace TL_ISA

TL_MATRIX_ENTRY(tl_linear_fp32_cpu,
                (const float *x, const float *weight, const float *bias, float *y, int64_t rows, int64_t inputs,
                 int64_t outputs, int64_t x_stride, int64_t weight_stride, int64_t y_stride, int activation,
                 int threads),
                (x, weight, bias, y, rows, inputs, outputs, x_stride, weight_stride, y_stride, activation, threads))
