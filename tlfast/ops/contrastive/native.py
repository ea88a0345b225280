"""The two reductions on the CPU: tiles of products, and C++ (csrc/ops/cpu/contrastive.cpp) over each in the cache."""

from __future__ import annotations

from dataclasses import replace

import torch

from ... import _native
from .._rows import as_float32, empty_float32
from .._shared_weight import shared_weight
from .tiles import Gradients, Pairs, Reduced, Wanted, gradients, parts

# Rows and columns of a tile, 4 MiB: of 256 to 2048 the fastest together with its products.
TILE = 1024
_NO_ACTIVATION = 5  # TL_NO_ACTIVATION of csrc/tlfast.h


class _Products:
    """Tiles of u v^T in float32, one at a time in the same memory."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = replace(pairs, u=as_float32(pairs.u), v=as_float32(pairs.v))
        self.scale = float(pairs.scale)
        self.memory = empty_float32(min(TILE, len(pairs.u)), min(TILE, len(pairs.v)))

    def __call__(self, i: slice, j: slice) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The tile, and what the C++ functions want to know of it."""
        rows, columns = i.stop - i.start, j.stop - j.start
        tile = self.memory[:rows, :columns]
        _multiply(self.pairs.u[i], self.pairs.v[j], tile)
        return tile, (rows, columns, tile.stride(0), i.start + self.pairs.offset - j.start)


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


def softmax_forward(pairs: Pairs) -> Reduced:
    products, library = _Products(pairs), _native.library()
    maxima = [torch.full((x.shape[0],), -torch.inf, dtype=torch.float32, device="cpu") for x in (pairs.u, pairs.v)]
    sums = [torch.zeros(x.shape[0], dtype=torch.float32, device="cpu") for x in (pairs.u, pairs.v)]
    own = empty_float32(len(pairs.u))
    for i in parts(len(pairs.u), TILE):
        for j in parts(len(pairs.v), TILE):
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
    pairs: Pairs, wanted: Wanted, dcolumns: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Gradients:
    products, library = _Products(pairs), _native.library()
    drows, dcolumns, down = (as_float32(x) for x in (wanted.drows, dcolumns, wanted.down))

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

    return gradients(products.pairs, wanted, (TILE, TILE), weights)


def sigmoid_forward(pairs: Pairs, bias: torch.Tensor) -> Reduced:
    products, library = _Products(pairs), _native.library()
    rows, slopes = (torch.zeros(len(pairs.u), dtype=torch.float32, device="cpu") for _ in range(2))
    own = empty_float32(len(pairs.u))
    for i in parts(len(pairs.u), TILE):
        for j in parts(len(pairs.v), TILE):
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


def sigmoid_backward(pairs: Pairs, bias: torch.Tensor, wanted: Wanted) -> Gradients:
    products, library = _Products(pairs), _native.library()
    drows, down = as_float32(wanted.drows), as_float32(wanted.down)

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

    return gradients(products.pairs, wanted, (TILE, TILE), weights)
