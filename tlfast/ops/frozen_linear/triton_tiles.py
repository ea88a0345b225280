"""What the GPU kernels of frozen linear layers share: which tile a program takes, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from .._triton import activate

# Programs a launch aims at, the multiprocessors of a large GPU: smaller tiles are taken where larger ones are fewer.
_PROGRAMS = 132
# Rows of tiles that run together: a column of tiles reads their part of x again and again, from the L2 cache.
GROUP = 8


@triton.jit
def tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    # the first rows of x and of the weight that this program multiplies: in GROUP rows of tiles, column after column
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return (first + inside % height).to(tl.int64) * BLOCK_M, (inside // height).to(tl.int64) * BLOCK_N


@triton.jit
def gate(y, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # neighbouring columns are a gate and what it gates, and lie in one thread's registers  # [ROWS, COLUMNS // 2]
    gates, rest = tl.split(tl.reshape(y, (ROWS, COLUMNS // 2, 2)))
    return activate(gates, ACTIVATION) * rest


@triton.jit
def finish(
    y, bias_ptr, y_ptr,
    first_row, first_output, M, N,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # bias, activation and gates of sums in float32, and the store  # [BLOCK_M, BLOCK_N]
    row, output = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_output + output, mask=output < N - first_output, other=0.0)[None, :]
    if GATED:
        y = gate(y, ACTIVATION, BLOCK_M, BLOCK_N)
        output, first_output, N = tl.arange(0, BLOCK_N // 2), first_output // 2, N // 2
    else:
        y = activate(y, ACTIVATION)
    y_tile = y_ptr + first_row * N + first_output + (row[:, None] * N + output[None, :])
    inside = (row < M - first_row)[:, None] & (output < N - first_output)[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=inside)


def configurations(columns: str, tiles: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    """Tile sizes by name; `columns` names the tile's third size."""
    names = ("BLOCK_M", "BLOCK_N", columns, "num_warps", "num_stages")
    return [{"GROUP": GROUP, **dict(zip(names, sizes, strict=True))} for sizes in tiles]


def choose(configs: list[dict[str, int]], rows: int, outputs: int) -> dict[str, int]:
    """The largest tile, of those no taller than the rows ask for, with enough programs for a GPU; else the smallest."""
    fitting = [c for c in configs if c["BLOCK_M"] <= max(configs[-1]["BLOCK_M"], triton.next_power_of_2(rows))]
    return next((c for c in fitting if programs(c, rows, outputs) >= _PROGRAMS), fitting[-1])


def programs(config: dict[str, int], rows: int, outputs: int) -> int:
    """How many tiles of a configuration cover the output."""
    return triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(outputs, config["BLOCK_N"])
