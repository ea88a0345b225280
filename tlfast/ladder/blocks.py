"""SideBlock: a transformer block of the backbone's own type, lean in what it keeps for its backward pass."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..backbone.parts import BlockSpec
from ..ops import add_norm, dropout_add, feed_forward, prenorm
from ..ops._activations import ACTIVATIONS as OF_OPERATIONS
from . import fused
from .attention import Rotation, SideAttention, SideCrossAttention
from .graphs import BlockGraphs

_TRANSFORMERS_NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
ACTIVATIONS = {name: OF_OPERATIONS[fused.operation_name(name)] for name in _TRANSFORMERS_NAMES}


def reduced(spec: BlockSpec, reduction: int, dropout: float | None = None) -> BlockSpec:
    """The shape of a side block: widths divided by the reduction, the number of heads kept.

    Raises ValueError, with the reductions that fit, where widths or heads do not divide.
    """
    least = 2 if spec.positions == "rotary" else 1  # rotations turn pairs of channels

    def fits(r: int) -> bool:
        return spec.width % r == 0 and spec.hidden % r == 0 and spec.head_dim % (least * r) == 0

    if not fits(reduction):
        allowed = [r for r in range(1, spec.width + 1) if fits(r)]
        raise ValueError(
            f"reduction: {reduction} does not divide a block of width {spec.width}, feed-forward {spec.hidden} and "
            f"{spec.heads} heads of {spec.head_dim} channels; allowed: {', '.join(map(str, allowed))}"
        )
    narrow = dataclasses.replace(
        spec,
        width=spec.width // reduction,
        hidden=spec.hidden // reduction,
        head_dim=spec.head_dim // reduction,
    )
    if dropout is None:
        return narrow
    return dataclasses.replace(narrow, hidden_dropout=dropout, attention_dropout=dropout)


class SideFeedForward(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x), as `tlfast.ops.feed_forward` runs it. forward(x): (B, S, R)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {spec.activation!r} is not available; allowed: {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[spec.activation]
        self.activation_name = fused.operation_name(spec.activation)
        self.up = nn.Linear(spec.width, spec.hidden, bias=spec.bias)
        self.gate = nn.Linear(spec.width, spec.hidden, bias=spec.bias) if spec.gated else None
        self.down = nn.Linear(spec.hidden, spec.width, bias=spec.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (parameter for layer in (self.up, self.down, self.gate) for parameter in fused.parameters_of(layer))
        return feed_forward(x, *weights, activation=self.activation_name)


class _Layer(NamedTuple):
    """One layer of a block for one forward: what it computes, its norms, and the seed of the dropout behind it."""

    function: Callable[[torch.Tensor], torch.Tensor]
    norm: Any
    output_norm: nn.Module | None
    seed: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.function(x)
        return y if self.output_norm is None else self.output_norm(y)


class SideBlock(nn.Module):
    """A transformer block (attention, cross-attention in a decoder, feed-forward) that keeps only its input.

    forward(x, key_mask): x (B, S, R), key_mask (B, S) bool, True where a token is. Returns (B, S, R). The other
    arguments are those of `SideAttention` and `SideCrossAttention`; cache and memory_cache hold what they keep.
    On a CPU, in float32 or under autocast in bfloat16, it is one operation where `fused.why_not` has nothing against
    it, and keeps x, the heads' output and, with norms behind the layers, one sum of width R, beside a few numbers a
    row. Otherwise it keeps x, and what other blocks read too (memory, bias, rotation, masks), and computes the rest
    once more in its backward pass, with the same dropout, on a GPU as CUDA graphs once a shape recurs (graphs.py); with
    a cache, as in decoding, everything is kept. The attention map exists in neither pass.
    What stands behind the last token of key_mask is without meaning, zeros as one operation.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.1, for norms behind the layers; Xiong et al. 2020 (arXiv
    2002.04745) for norms before them.
    """

    def __init__(self, spec: BlockSpec, memory_width: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.graphs = BlockGraphs()  # a side network gives all its blocks the same
        self.attention = SideAttention(spec)
        self.attention_norm = _norm(spec)
        self.cross_attention = SideCrossAttention(spec, memory_width or spec.width) if spec.cross else None
        self.cross_attention_norm = _norm(spec) if spec.cross else None
        self.feed_forward = SideFeedForward(spec)
        self.feed_forward_norm = _norm(spec)
        sandwich = spec.placement == "sandwich"
        self.attention_output_norm = _norm(spec) if sandwich else None
        self.feed_forward_output_norm = _norm(spec) if sandwich else None
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        cache: Any = None,
        memory_cache: Any = None,
    ) -> torch.Tensor:
        # drawn here, so that recomputing draws nothing
        count = 5 if self.spec.cross else 3
        drawn = torch.randint(2**62, (count,)) if self.training else None
        cosines, sines = (None, None) if rotation is None else rotation
        optional = {
            "key_mask": key_mask,
            "bias": bias,
            "cosines": cosines,
            "sines": sines,
            "memory": memory,
            "memory_mask": memory_mask,
        }
        others = {"bias": bias, "rotation": rotation, "memory": memory, "cache": cache}
        if fused.why_not(self, x, others) is None:
            return fused.run(self, x, key_mask, drawn)
        if not torch.is_grad_enabled() or cache is not None:
            return self._compute(drawn, x, **optional, cache=cache, memory_cache=memory_cache)
        found = self.graphs.run(self, SideBlock._compute, {"x": x, **optional}, drawn)
        if found is not None:
            return found
        # recomputing ends at the input of the last product: that one is not needed again
        return checkpoint(self._compute, drawn, x, *optional.values(), use_reentrant=False, preserve_rng_state=False)

    def _compute(
        self,
        drawn: torch.Tensor | None,
        x: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        cosines: torch.Tensor | None = None,
        sines: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        cache: Any = None,
        memory_cache: Any = None,
    ) -> torch.Tensor:
        """The block's output, everything kept for its backward pass; drawn: the seeds of dropout."""
        seeds = (None,) * 5 if drawn is None else drawn.unbind()
        dropout_p = self.spec.attention_dropout if self.training else 0.0
        attend = functools.partial(
            self.attention,
            key_mask=key_mask,
            bias=bias,
            rotation=None if cosines is None or sines is None else (cosines, sines),
            dropout_p=dropout_p,
            seed=seeds[0],
            cache=cache,
        )
        layers = [_Layer(attend, self.attention_norm, self.attention_output_norm, seeds[1])]
        if self.cross_attention is not None:
            look = functools.partial(
                self.cross_attention,
                memory=memory,
                memory_mask=memory_mask,
                dropout_p=dropout_p,
                seed=seeds[3],
                cache=memory_cache,
            )
            layers.append(_Layer(look, self.cross_attention_norm, None, seeds[4]))
        layers.append(_Layer(self.feed_forward, self.feed_forward_norm, self.feed_forward_output_norm, seeds[2]))
        return self._post_norm(x, layers) if self.spec.placement == "post" else self._pre_norm(x, layers)

    def _post_norm(self, x: torch.Tensor, layers: list[_Layer]) -> torch.Tensor:
        """x = norm(x + layer(x))."""
        for layer in layers:
            x = add_norm(layer(x), x, layer.norm.weight, _bias(layer.norm), seed=layer.seed, **self._settings())
        return x

    def _pre_norm(self, x: torch.Tensor, layers: list[_Layer]) -> torch.Tensor:
        """x = x + layer(norm(x)); a layer's sum and the next one's norm are one operation."""
        settings = self._settings()
        y = _normed(x, layers[0].norm)
        for layer, following in itertools.pairwise(layers):
            norm = following.norm
            x, y = prenorm(layer(y), x, norm.weight, _bias(norm), seed=layer.seed, **settings)
        return dropout_add(layers[-1](y), x, settings["dropout_p"], layers[-1].seed)

    def _settings(self) -> dict[str, Any]:
        dropout_p = self.spec.hidden_dropout if self.training else 0.0
        return {"eps": self.spec.eps, "norm": self.spec.norm, "dropout_p": dropout_p}


def _norm(spec: BlockSpec) -> nn.Module:
    if spec.norm == "rms":
        return nn.RMSNorm(spec.width, eps=spec.eps)
    return nn.LayerNorm(spec.width, eps=spec.eps)


def _normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    if isinstance(norm, nn.RMSNorm) and norm.weight.dtype != x.dtype:  # under autocast; PyTorch fuses it in one dtype
        return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
    return norm(x)


def _bias(norm: Any) -> torch.Tensor | None:
    return getattr(norm, "bias", None)
