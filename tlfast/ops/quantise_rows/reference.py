"""The formula of quantised rows in plain PyTorch."""

from __future__ import annotations

import torch

from .._quantised import LARGEST, SMALLEST_SCALE


def quantise_rows(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if smooth is not None:
        x = x * smooth
    magnitude = x.abs().amax(-1, keepdim=True)
    scale = magnitude / LARGEST[dtype]
    scale = scale.where(~(scale < SMALLEST_SCALE), 0)
    told = (scale > 0) & scale.isfinite()
    # torch.div, since number / tensor is rounded twice: PyTorch takes it as number * (1 / tensor)
    inverse = torch.div(magnitude.new_tensor(LARGEST[dtype]), magnitude)
    values = (x * inverse).where(told, 0)
    if dtype == torch.int8:
        values = values.round()
    return values.to(dtype), scale.squeeze(-1)
