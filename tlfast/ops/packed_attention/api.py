"""Attention over sequences packed one behind the other, for frozen models: forward only."""

from __future__ import annotations

import math
from operator import sub

import torch

from .. import _dispatch
from . import buckets, native, reference, varlen

IMPLEMENTATIONS = ("reference", "native", "varlen", "buckets")

_RUN = {
    "reference": reference.packed_attention,
    "native": native.packed_attention,
    "buckets": buckets.packed_attention,
}
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    on_device: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(scale * q k^T + bias) v for each head and each sequence by itself; no graph is built.

    Args:
        q: (T, H, hd) the tokens of all sequences, any strides but the last: views of one fused projection need no copy.
        k, v: (Tk, Hkv, hd) in the dtype of q. H is a multiple of Hkv: head h of q reads head h // (H / Hkv).
        cu_seqlens: int32 (B + 1,), rising from 0 to T, on the host or on q's device: sequence b is the tokens
            cu_seqlens[b] to cu_seqlens[b + 1]. Sequences may be empty.
        cu_seqlens_k: the same for k and v, where their sequences are others (cross-attention).
        scale: of the scores, > 0; default hd ** -0.5.
        causal: query i of a sequence sees its keys j <= i + keys - queries (aligned at the last key, as with a cache).
        window: key j is seen where |i - j| <= window.
        bias: fp32 (H, S, Sk), added to the scores of every sequence; S and Sk reach at least the longest sequence.
        rotation: cosines and sines, fp32 (T, hd) each, for the tokens of q and of k alike: rotates each first half of q
            and k against its second (Llama's convention), in fp32. hd is even.
        on_device: cu_seqlens and cu_seqlens_k (or cu_seqlens again) on q's device, of a caller who has them there and
            on the host too: with cu_seqlens on the host and these, nothing is copied and nothing waits for a GPU.
        impl: "auto", "reference" (plain formula, a map a sequence), "native" (C++), "varlen" (GPU: PyTorch's flash
            attention, one call for all sequences; bfloat16 and float16, no bias) or "buckets" (PyTorch's
            scaled_dot_product_attention, one call for all sequences of a length). A named one runs or raises.

    Returns:
        (T, H, hd), contiguous, in the dtype of q. A query that sees no key gives zeros. Softmax is in float32. A NaN
        stays in its sequence. In bfloat16, "native" rounds rotated queries and keys and the unnormalised probabilities
        to bfloat16, as the hardware multiplies those; "buckets" rounds the bias too, and keeps one mask of the longest
        sequence where a window, or causal with other keys or a bias, needs one.

    Cost, for M = H * sum of queries x keys that are seen: 4 M hd flops and M exponentials; at least the bytes of q, k,
    v and the result, each once. "native" works on tiles of 32 queries x 256 keys. "varlen" rotates in a pass of its
    own, which reads and writes q and k.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit; inputs that need a gradient; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), equation 1; online softmax: Milakov
    and Gimelshein, 2018 (arXiv 1805.02867); rotation: Su et al., "RoFormer", 2021 (arXiv 2104.09864).
    """
    _check(q, k, v, scale, window, bias)
    _check_offsets(q, k, cu_seqlens, cu_seqlens_k)
    if on_device is not None:
        _check_on_device(q, cu_seqlens, on_device)
    if rotation is not None:
        _check_rotation(q, k, cu_seqlens_k, rotation)
    _check_gradients(q, k, v, bias, rotation)

    def refuses(name: str) -> str | None:
        if name == "native" and q.dtype not in _NATIVE_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {q.dtype}; use impl='buckets'"
        if name == "varlen":
            return varlen.refuses(q, window, bias, cu_seqlens_k is not None, rotation is not None)
        return None

    chosen = _dispatch.choose("packed_attention", impl, IMPLEMENTATIONS, q.device.type, refuses)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    cosines, sines = (None, None) if rotation is None else rotation
    placed, placed_k = (None, None) if on_device is None else on_device
    run = _run if _dispatch.runs_eagerly(q, k, v, bias) else torch.ops.tlfast.packed_attention.default
    return run(q, k, v, cu_seqlens, cu_seqlens_k, scale, causal, window, bias, cosines, sines, placed, placed_k, chosen)


torch.library.define(
    "tlfast::packed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, float scale, bool causal, int? window,"
    " Tensor? bias, Tensor? cosines, Tensor? sines, Tensor? placed, Tensor? placed_k, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    placed: torch.Tensor | None,
    placed_k: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    """What needs the offsets' values, which a tracer does not have."""
    longest = _check_values("cu_seqlens", cu_seqlens, q.shape[0], "q")
    longest_k = longest
    if cu_seqlens_k is not cu_seqlens or k.shape[0] != q.shape[0]:
        longest_k = _check_values("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")
    if bias is not None and (bias.shape[1] < longest or bias.shape[2] < longest_k):
        needed = (q.shape[1], longest, longest_k)
        raise ValueError(f"bias must be at least {needed} for the longest sequence, not {tuple(bias.shape)}")
    rotation = None if cosines is None or sines is None else (cosines, sines)
    if impl == "varlen":
        starts = _placed(cu_seqlens, placed, q), _placed(cu_seqlens_k, placed_k, q)
        return varlen.packed_attention(q, k, v, starts, (longest, longest_k), scale, causal, window, rotation)
    return _RUN[impl](q, k, v, cu_seqlens, cu_seqlens_k, scale, causal, window, bias, rotation)


def _placed(offsets: torch.Tensor, placed: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    return offsets.to(q.device, non_blocking=True) if placed is None else placed


torch.library.impl("tlfast::packed_attention", "CompositeExplicitAutograd", _run)


@torch.library.register_fake("tlfast::packed_attention")
def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    placed: torch.Tensor | None,
    placed_k: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _check_values(name: str, offsets: torch.Tensor, tokens: int, of: str) -> int:
    """The longest sequence."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != tokens or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to the {tokens} tokens of {of}, not be {values}")
    return max(map(sub, values[1:], values[:-1]), default=0)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    window: int | None,
    bias: torch.Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            shape = tuple(x.shape)
            raise ValueError(f"{name} must be floating-point (tokens, heads, hd), not {x.dtype} of shape {shape}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and q {q.dtype} on {q.device}: convert them to one dtype and device"
            )
    (_, heads, head_dim), (tokens_k, kv_heads, _) = q.shape, k.shape
    if head_dim == 0:
        raise ValueError(f"q must have at least one channel a head, not shape {tuple(q.shape)}")
    if k.shape[2] != head_dim or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k must be (Tk, a divisor of {heads}, {head_dim}) as q is, not {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must be {(tokens_k, kv_heads, head_dim)} as k is, not {tuple(v.shape)}")
    if scale is not None and (not math.isfinite(scale) or scale <= 0):
        raise ValueError(f"scale must be finite and greater than 0, not {scale}")
    if window is not None and window < 0:
        raise ValueError(f"window must be None or at least 0, not {window}")
    if bias is None:
        return
    if bias.dtype != torch.float32 or bias.dim() != 3 or bias.shape[0] != heads or bias.device != q.device:
        given = f"{bias.dtype} of shape {tuple(bias.shape)} on {bias.device}"
        raise ValueError(f"bias must be float32 ({heads}, S, Sk) on {q.device}, not {given}")


def _check_offsets(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None
) -> None:
    for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets is None:
            continue
        if offsets.dtype != torch.int32 or offsets.dim() != 1 or not offsets.shape[0]:
            given = f"{offsets.dtype} of shape {tuple(offsets.shape)}"
            raise ValueError(f"{name} must be int32 (B + 1,), not {given}: use lengths.cumsum(0) behind a 0, .int()")
        if offsets.device.type != "cpu" and offsets.device != q.device:
            raise ValueError(f"{name} must be on the CPU or on {q.device} as q is, not on {offsets.device}")
    if cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has {k.shape[0]} tokens and q {q.shape[0]}: pass cu_seqlens_k for k's sequences")
    if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
        expected = tuple(cu_seqlens.shape)
        raise ValueError(f"cu_seqlens_k must be {expected} as cu_seqlens is, not {tuple(cu_seqlens_k.shape)}")


def _check_on_device(q: torch.Tensor, cu_seqlens: torch.Tensor, on_device: tuple[torch.Tensor, torch.Tensor]) -> None:
    for offsets in on_device:
        if offsets.dtype != torch.int32 or offsets.shape != cu_seqlens.shape or offsets.device != q.device:
            given = f"{offsets.dtype} of shape {tuple(offsets.shape)} on {offsets.device}"
            raise ValueError(f"on_device must be two of int32 {tuple(cu_seqlens.shape)} on {q.device}, not {given}")


def _check_rotation(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_k: torch.Tensor | None, rotation: tuple[torch.Tensor, torch.Tensor]
) -> None:
    if cu_seqlens_k is not None:
        raise ValueError("rotation needs q and k of the same tokens: leave out cu_seqlens_k, or rotate q and k before")
    tokens, _, head_dim = q.shape
    for part in rotation:
        if part.shape != (tokens, head_dim) or part.dtype != torch.float32 or part.device != q.device or head_dim % 2:
            given = f"{part.dtype} of shape {tuple(part.shape)} on {part.device}"
            raise ValueError(
                f"rotation must be two of float32 ({tokens}, {head_dim}) on {q.device}, with an even hd, not {given}"
            )


def _check_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", bias), *(("rotation", part) for part in rotation or ())):
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name} needs a gradient, which packed_attention has not: call it under torch.no_grad(), or use"
                " attention()"
            )
