"""How kernels see tensors: which views are copied."""

from __future__ import annotations

import pytest
import torch

from tlfast.ops._rows import as_operand


@pytest.mark.parametrize(
    "shape, strides, copied",
    [
        ((3, 64), (2**30, 1), True),
        ((2, 64), (2**30, 1), True),
        ((2, 64), (2**30 - 1, 1), False),
        ((1, 64), (2**31, 1), False),  # a single row has no next one
        ((4, 5, 64), (5 * 2**27, 2**27, 1), True),
        ((2, 7, 64), (7 * 80, 80, 1), False),
        ((2**26, 64), (64, 1), False),  # of contiguous rows a copy would change nothing
        ((0, 64), (64, 1), False),
    ],
    ids=str,
)
def test_rows_too_far_apart_for_a_product_are_copied(shape, strides, copied):
    with torch.device("meta"):
        x = torch.empty(1, dtype=torch.bfloat16).expand(shape).as_strided(shape, strides)
        rows = as_operand(x)
    assert rows.shape == (x.numel() // 64, 64) and rows.stride(1) == 1
    assert rows.stride(0) == (64 if copied else strides[-2])


def test_a_view_of_near_rows_is_not_copied():
    wide = torch.randn(2, 7, 80)
    rows = as_operand(wide[..., 8:72])
    assert torch.equal(rows, wide.view(14, 80)[:, 8:72])
    assert rows.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
