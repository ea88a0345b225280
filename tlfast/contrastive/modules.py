"""The contrastive loss as a module that learns its scale."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .losses import clip_loss, unicl_loss


class UniCLLoss(nn.Module):
    """`unicl_loss` of normalised embeddings with a learned scale tau = exp(log_scale).

    Args:
        scale: tau at the start, positive; dimensionless. The default is CLIP's, 1 / 0.07.
        max_scale: tau is kept at or below it, as CLIP does; dimensionless.
        impl, group: as for `unicl_loss`.

    Raises:
        ValueError: scale or max_scale that are not 0 < scale <= max_scale < inf; in forward what `unicl_loss` raises.

    Source: as of `unicl_loss`; the learned scale: Radford et al. 2021 (arXiv 2103.00020), section 2.5.
    """

    def __init__(
        self, scale: float = 1 / 0.07, max_scale: float = 100.0, impl: str = "auto", group: Any = None
    ) -> None:
        super().__init__()
        if not 0 < scale <= max_scale < math.inf:
            raise ValueError(
                f"scale must be in (0, max_scale], max_scale finite, not {scale} with max_scale {max_scale}"
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.max_scale, self.impl, self.group = max_scale, impl, group

    def forward(self, image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """image, text: (B, D), normalised here; labels: (B,) int64, None where all are distinct. Returns the loss."""
        with torch.no_grad():  # a clamp in the graph would leave a scale beyond the bound without a gradient
            self.log_scale.clamp_(max=math.log(self.max_scale))
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        scale = self.log_scale.exp()
        if labels is None:
            return clip_loss(image, text, scale, self.impl, self.group)
        return unicl_loss(image, text, labels, scale, self.impl, self.group)

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}, impl={self.impl!r}"
