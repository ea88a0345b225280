"""What a ladder keeps for its backward pass, in bytes: one function a term.

A term is of all tokens of a batch in one stack. R is the side network's width, D the backbone's, H heads.
"""

from __future__ import annotations

from ..backbone.parts import BlockSpec
from ..ladder import fused
from ..ops.linear_cross_entropy.recompute import rows_at_once

FLOAT = 4
STORAGES = ("keep", "int8", "project", "stream", "offload")


def tap(storage: str, tokens: int, width: int, itemsize: int, tap_dim: int) -> int:
    """One tap in its storage, on the device: what dW of its rung is computed from. The embedding is kept like a tap.

    itemsize: of the backbone's numbers. "int8": a byte a channel and a scale a token. "project": tap_dim numbers.
    "stream" has it made anew by a second forward, "offload" has it in host memory (`on_host`).
    """
    if storage == "keep":
        return tokens * width * itemsize
    if storage == "int8":
        return tokens * (width + FLOAT)
    if storage == "project":
        return tokens * tap_dim * itemsize
    return 0


def on_host(storage: str, tokens: int, width: int, itemsize: int) -> int:
    """One tap in host memory."""
    return tokens * width * itemsize if storage == "offload" else 0


def rung(spec: BlockSpec, storage: str, tokens: int) -> int:
    """What a rung gives, which its side block starts from; and what it was given, for its gate, where a tap is kept."""
    return tokens * spec.width * FLOAT * (1 if storage in ("project", "stream") else 2)


def block(spec: BlockSpec, tokens: int) -> int:
    """What a side block keeps beside its input: nothing, unless it runs as one operation, which a CPU has for it.

    That keeps the heads' output, with norms behind the layers the sum before the last one, and attention's rows.
    """
    if fused.why_not_of_its_form(spec) is not None:
        return 0
    sums = spec.width if spec.placement == "post" else 0
    return tokens * (spec.heads * spec.head_dim + sums + 2 * spec.heads) * FLOAT


def relative_bias(spec: BlockSpec, length: int) -> int:
    """T5's bias by position, one for all blocks and samples, and its buckets."""
    return length**2 * (spec.heads * FLOAT + 8) if spec.positions == "relative" else 0


def end(spec: BlockSpec, tokens: int, read: bool) -> int:
    """The last state of the side network and what its final norm keeps. read: by a linear layer, every token of it."""
    tensors = (1 if spec.norm == "layer" else 2) + read
    return tokens * (tensors * spec.width + _NORM_ROWS[spec.norm]) * FLOAT


def classifier(vectors: int, width: int) -> int:
    """A head that reads one vector a sample, or a token: what it blends, its result, and a byte of dropout's mask."""
    return vectors * width * (4 * FLOAT + 1)


def language_head(tokens: int, width: int, itemsize: int) -> int:
    """The gradient of what the frozen head reads, which comes with the loss, and the last state of the backbone."""
    return tokens * width * (FLOAT + itemsize)


def logits_at_once(tokens: int, width: int, vocabulary: int) -> int:
    """The part of the logits that exists while the loss is computed; not kept."""
    return vocabulary * min(tokens, rows_at_once(tokens, width, vocabulary)) * FLOAT


def inside_block(spec: BlockSpec, tokens: int) -> int:
    """One side block while the backward pass computes it once more: attention, norms, feed-forward. Not kept."""
    narrow = spec.width * _narrow(spec) + _attention(spec) + _rows(spec)
    return tokens * (narrow + (3 if spec.gated else 2) * spec.hidden) * FLOAT


def inside_crossing(spec: BlockSpec, tokens: int, memory_tokens: int) -> int:
    """The cross-attention of one decoder block, then: queries, output, sum and norm; keys and values of the source."""
    inner = spec.heads * spec.head_dim
    own = tokens * (2 * inner + 2 * spec.width + 2 * spec.heads + _NORM_ROWS[spec.norm])
    return (own + memory_tokens * 2 * inner) * FLOAT


def waiting(spec: BlockSpec, storage: str, tokens: int) -> int:
    """What the second forward of "stream" reads of one rung: the gradient of what it gave. Not kept by the forward."""
    return tokens * spec.width * FLOAT if storage == "stream" else 0


_NORM_ROWS = {"layer": 2, "rms": 1}


def _narrow(spec: BlockSpec) -> int:
    """Tensors of width R."""
    if spec.placement == "post":
        return 5  # the rung's result, and sum and norm behind both layers
    # the block before's result and the rung's, its norm (of RMSNorm two steps), and sum and norm after attention
    before = 5 if spec.norm == "layer" else 6
    # and what each layer gives, in the steps of its norm
    return before + 6 if spec.placement == "sandwich" else before


def _attention(spec: BlockSpec) -> int:
    """Numbers a token of queries, keys, values and the heads' output."""
    inner, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projection, shared, turned = inner + 2 * keys, keys < inner, spec.positions == "rotary"
    made = projection
    if turned and shared:
        made = inner  # keys and values are repeated for the heads of a group, and the projection is let go
    elif turned:
        made += inner + keys  # values are a view of the projection, which stays whole
    if shared:
        made += 2 * inner
    if spec.qk_norm:
        made += projection + inner + keys
    return made + inner


def _rows(spec: BlockSpec) -> int:
    return 2 * spec.heads + 2 * _NORM_ROWS[spec.norm]
