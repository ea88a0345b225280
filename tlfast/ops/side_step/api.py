"""One new position of each sequence through a rung and a side block: what a side network computes for a new token."""

from __future__ import annotations

import torch

from .. import _dispatch
from . import native, reference
from .weights import ACTIVATIONS, StepSettings, StepWeights

IMPLEMENTATIONS = ("reference", "native")


def side_step(
    tap: torch.Tensor,
    s: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: StepWeights,
    settings: StepSettings,
    *,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """block(mu * s + (1 - mu) * (W tap + b)) for one position whose past keys and values are cached; no graph is built.

    Args:
        tap: (B, D), the backbone's. s: (B, R), the side state.
        keys, values: (B, kv_heads, P, head_dim) of the P positions before, P may be 0.
        weights, settings: of the rung and the block. The query attends to the P cached positions and to itself.
        key_mask: (B, P + 1) bool, True where a token is.
        bias: (heads, P + 1), added to the scores. rotation: cosines and sines, (1 or B, head_dim) each.
        impl: "auto", "reference" (plain PyTorch) or "native" (C++, CPU, float32). A named one runs or raises.

    Returns:
        (B, R) the new side state, and this position's keys and values, (B, kv_heads, head_dim) each.

    Cost: the bytes of the weights, once; 2 flops a weight and sequence, and 4 P heads head_dim for attention. In plain
    PyTorch the calls themselves cost several times that.

    Raises:
        ValueError: shapes or settings that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Sung et al. 2022 (arXiv 2206.06522), section 3.2, with Vaswani et al. 2017 (arXiv 1706.03762), section 3.1.
    """
    _check(tap, s, keys, values, weights, settings, key_mask)

    def refuses(name: str) -> str | None:
        if name == "native" and not all(w is None or w.dtype == torch.float32 for w in (tap, s, keys, *weights)):
            return f"it takes float32, and not all of tap ({tap.dtype}), s, keys and weights are; use impl='reference'"
        return None

    chosen = _dispatch.choose("side_step", impl, IMPLEMENTATIONS, tap.device.type, refuses)
    run = native.side_step if chosen == "native" else reference.side_step
    with torch.no_grad():
        return run(tap, s, keys, values, weights, settings, key_mask, bias, rotation)


def _check(
    tap: torch.Tensor,
    s: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: StepWeights,
    settings: StepSettings,
    key_mask: torch.Tensor | None,
) -> None:
    side_width, width = weights.rung_weight.shape
    batch, past = tap.shape[0], keys.shape[2] if keys.dim() == 4 else -1
    if tap.shape != (batch, width):
        raise ValueError(f"tap must be (B, {width}) as the rung's weight is, not {tuple(tap.shape)}")
    if s.shape != (batch, side_width):
        raise ValueError(f"s must be {(batch, side_width)} as tap and the rung's weight are, not {tuple(s.shape)}")
    expected = (batch, settings.kv_heads, past, settings.head_dim)
    for name, cached in (("keys", keys), ("values", values)):
        if cached.shape != expected:
            raise ValueError(f"{name} must be (B, kv_heads, P, head_dim) = {expected}, not {tuple(cached.shape)}")
    if key_mask is not None and (key_mask.shape != (batch, past + 1) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool, (B, P + 1) = {(batch, past + 1)}, not {key_mask.dtype} of {tuple(key_mask.shape)}"
        )
    if settings.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {settings.activation!r}")
