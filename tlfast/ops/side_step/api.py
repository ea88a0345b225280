"""One new position of each sequence through a rung and a side block: what a side network computes for a new token."""

from __future__ import annotations

import torch

from .. import _dispatch
from . import native, reference
from .weights import ACTIVATIONS, NORMS, PLACEMENTS, StepSettings, StepWeights

IMPLEMENTATIONS = ("reference", "native")

_HEAD_NORMS = ("query_norm", "key_norm")


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
    _check(tap, s, keys, values, weights, settings, key_mask, bias, rotation)

    def refuses(name: str) -> str | None:
        numbers = (tap, s, keys, values, bias, *(rotation or ()), *weights)
        if name == "native" and not all(x is None or x.dtype == torch.float32 for x in numbers):
            return f"it takes float32, and not all of tap ({tap.dtype}), its other inputs and weights are"
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
    w: StepWeights,
    settings: StepSettings,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    _check_settings(settings)
    (side_width, width), hidden = w.rung_weight.shape, w.up_weight.shape[0]
    batch, past = tap.shape[0], keys.shape[2] if keys.dim() == 4 else -1
    heads, kv_heads, head_dim = settings.heads, settings.kv_heads, settings.head_dim
    qkv, cached = (heads + 2 * kv_heads) * head_dim, (batch, kv_heads, past, head_dim)
    norms = {name: (side_width,) for name in w._fields if "norm" in name} | dict.fromkeys(_HEAD_NORMS, (head_dim,))
    shapes = {
        "tap": (batch, width),
        "s": (batch, side_width),
        "keys": cached,
        "values": cached,
        "key_mask": (batch, past + 1),
        "bias": (heads, past + 1),
        "rung_bias": (side_width,),
        "qkv_weight": (qkv, side_width),
        "qkv_bias": (qkv,),
        "output_weight": (side_width, heads * head_dim),
        "output_bias": (side_width,),
        **{f"{name}_weight": (hidden, side_width) for name in ("up", "gate")},
        **{f"{name}_bias": (hidden,) for name in ("up", "gate")},
        "down_weight": (side_width, hidden),
        "down_bias": (side_width,),
        **norms,
    }
    given = {"tap": tap, "s": s, "keys": keys, "values": values, "key_mask": key_mask, "bias": bias, **w._asdict()}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.device != tap.device:
            raise ValueError(f"{name} is on {tensor.device} and tap on {tap.device}: move them to one device")
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(
                f"{name} must be {shapes[name]} as tap, keys and the weights are, not {tuple(tensor.shape)}"
            )
    if w.alpha.shape not in ((), (1,), (side_width,)):
        raise ValueError(f"alpha must be (), (1,) or ({side_width},), not {tuple(w.alpha.shape)}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be bool, True where a token is, not {key_mask.dtype}: use mask.bool()")
    for part in rotation or ():
        if part.shape not in ((1, head_dim), (batch, head_dim)) or head_dim % 2:
            raise ValueError(
                f"rotation must be two of (1 or B, head_dim) with an even head_dim, not {tuple(part.shape)}"
            )


def _check_settings(settings: StepSettings) -> None:
    for name, allowed in (("activation", ACTIVATIONS), ("placement", PLACEMENTS), ("norm", NORMS)):
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, not {getattr(settings, name)!r}")
    if settings.kv_heads < 1 or settings.heads % settings.kv_heads:
        raise ValueError(f"kv_heads must divide the {settings.heads} heads, not be {settings.kv_heads}")
