"""The two reductions on the CPU: tiles of products, and C++ (csrc/ops/cpu/contrastive.cpp) over each in the cache."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_float32, empty_float32
from .._shared_weight import shared_weight
from .tiles import Gradients, gradients, parts

# Rows and columns of a tile, 4 MiB: of 256 to 2048 the fastest together with its products.
TILE = 1024
_NO_ACTIVATION = 5  # TL_NO_ACTIVATION of csrc/tlfast.h


class _Products:
    """Tiles of u v^T in float32, one at a time in the same memory."""

    def __init__(self, u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int) -> None:
        self.u, self.v = as_float32(u), as_float32(v)
        self.scale, self.offset = float(scale), offset
        self.memory = empty_float32(min(TILE, u.shape[0]), min(TILE, v.shape[0]))

    def __call__(self, i: slice, j: slice) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The tile, and what the C++ functions want to know of it."""
        rows, columns = i.stop - i.start, j.stop - j.start
        tile = self.memory[:rows, :columns]
        _multiply(self.u[i], self.v[j], tile)
        return tile, (rows, columns, tile.stride(0), i.start + self.offset - j.start)


def _multiply(u: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """out = u v^T: by tlfast's split products on AMX, which are as accurate as PyTorch's and faster."""
    if _native.matrix_isa() != "AMX":
        torch.mm(u, v.T, out=out)
        return
    weight = shared_weight([v])
    _native.library().linear_fp32_cpu(
        u.data_ptr(),
        weight.data_ptr(),
        0,
        out.data_ptr(),
        u.shape[0],
        u.shape[1],
        v.shape[0],
        u.stride(0),
        out.stride(0),
        _NO_ACTIVATION,
        False,
        torch.get_num_threads(),
    )


def softmax_forward(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    products, library = _Products(u, v, scale, offset), _native.library()
    maxima = [torch.full((x.shape[0],), -torch.inf, dtype=torch.float32, device="cpu") for x in (u, v)]
    sums = [torch.zeros(x.shape[0], dtype=torch.float32, device="cpu") for x in (u, v)]
    own = empty_float32(u.shape[0])
    for i in parts(u.shape[0], TILE):
        for j in parts(v.shape[0], TILE):
            tile, sizes = products(i, j)
            library.contrastive_softmax_forward_cpu(
                tile.data_ptr(),
                maxima[0][i].data_ptr(),
                sums[0][i].data_ptr(),
                maxima[1][j].data_ptr(),
                sums[1][j].data_ptr(),
                own[i].data_ptr(),
                *sizes,
                products.scale,
                torch.get_num_threads(),
            )
    rows, columns = (maximum.add_(total.log_()) for maximum, total in zip(maxima, sums, strict=True))
    return rows, columns, own


def softmax_backward(
    drows: torch.Tensor,
    dcolumns: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
) -> Gradients:
    products, library = _Products(u, v, scale, offset), _native.library()
    drows, dcolumns, down = (as_float32(x) for x in (drows, dcolumns, down))

    def weights(i: slice, j: slice) -> torch.Tensor:
        tile, sizes = products(i, j)
        library.contrastive_softmax_backward_cpu(
            tile.data_ptr(),
            rows[i].data_ptr(),
            drows[i].data_ptr(),
            columns[j].data_ptr(),
            dcolumns[j].data_ptr(),
            down[i].data_ptr(),
            *sizes,
            products.scale,
            torch.get_num_threads(),
        )
        return tile

    return gradients(products.u, products.v, scale, (TILE, TILE), need_du, need_dv, weights)


def sigmoid_forward(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    products, library = _Products(u, v, scale, offset), _native.library()
    rows, slopes = (torch.zeros(u.shape[0], dtype=torch.float32, device="cpu") for _ in range(2))
    own = empty_float32(u.shape[0])
    for i in parts(u.shape[0], TILE):
        for j in parts(v.shape[0], TILE):
            tile, sizes = products(i, j)
            library.contrastive_sigmoid_forward_cpu(
                tile.data_ptr(),
                rows[i].data_ptr(),
                slopes[i].data_ptr(),
                own[i].data_ptr(),
                *sizes,
                products.scale,
                float(bias),
                torch.get_num_threads(),
            )
    return rows, slopes, own


def sigmoid_backward(
    drows: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
) -> Gradients:
    products, library = _Products(u, v, scale, offset), _native.library()
    drows, down = as_float32(drows), as_float32(down)

    def weights(i: slice, j: slice) -> torch.Tensor:
        tile, sizes = products(i, j)
        library.contrastive_sigmoid_backward_cpu(
            tile.data_ptr(),
            drows[i].data_ptr(),
            down[i].data_ptr(),
            *sizes,
            products.scale,
            float(bias),
            torch.get_num_threads(),
        )
        return tile

    return gradients(products.u, products.v, scale, (TILE, TILE), need_du, need_dv, weights)
