"""Attention on a GPU by PyTorch's own fused kernels, in the cases where they keep no map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    dropout_p: float,
) -> str | None:
    """Why these inputs would need a stored map, or None."""
    if q.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {q.dtype}; use impl='recompute'"
    if dropout_p > 0:
        return "PyTorch's kernels draw their own dropout mask, not the one of the seed; use impl='recompute'"
    if bias is not None and bias.requires_grad:
        return "a bias that needs a gradient would make it keep the map; use impl='recompute'"
    if causal and (bias is not None or key_mask is not None or q.shape[1] != k.shape[1]):
        return "causal with a bias, a key_mask or Sq != Sk needs an Sq x Sk mask that it keeps; use impl='recompute'"
    if bias is not None and key_mask is not None:
        return "a bias with a key_mask needs their sum, a map that it keeps; use impl='recompute'"
    return None


def attention(  # pragma: gpu
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    sees_a_key = None
    if key_mask is not None:
        # a sample without any key is given all of them, for finite numbers, and its rows are then set to 0
        sees_a_key = key_mask.any(-1)[:, None, None, None]
        mask = key_mask[:, None, None, :] | ~sees_a_key
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal, scale=scale
        ).transpose(1, 2)
    if sees_a_key is not None:
        out = torch.where(sees_a_key, out, 0)
    return out.contiguous()
