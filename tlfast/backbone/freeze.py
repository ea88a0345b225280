"""freeze(): a model whose activations are read and whose weights are never touched."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import BlockSpec, Family, block_spec, find_family, submodule
from .fingerprint import fingerprint

PRECISIONS = ("fp32",)


@dataclass(frozen=True)
class BackboneOutput:
    """What one frozen forward gives: B batch, S sequence, D width.

    Padded (the default): (B, S, D) each, zeros at padding, cu_seqlens is None.
    Packed: (tokens, D) each, the sequences end to end without padding; cu_seqlens (B + 1,) int32 are their bounds.
    """

    embedding: torch.Tensor
    taps: tuple[torch.Tensor, ...]
    last_hidden_state: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


class FrozenBackbone(nn.Module):
    """A frozen transformers model with taps. Made by `freeze`.

    The model's parameters are shared, not copied, and never change. Always in eval mode, never builds a graph.
    """

    def __init__(self, model: Any, family: Family, taps: tuple[int, ...], precision: str) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.tap_indices = taps
        self.precision = precision
        self._fingerprint: str | None = None
        self.train(False)

    @property
    def config(self) -> Any:
        """The transformers configuration of the frozen model."""
        return self.model.config

    @property
    def embedding(self) -> nn.Module:
        """The module whose output is the embedding."""
        return submodule(self.model, self.family.embedding)

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's list of transformer blocks."""
        return submodule(self.model, self.family.blocks)

    @property
    def block_spec(self) -> BlockSpec:
        """The shape of the model's blocks."""
        return block_spec(self.model, self.family)

    @property
    def name(self) -> str:
        """Where the model came from, as transformers knows it; empty for a model made from a configuration."""
        return getattr(self.config, "_name_or_path", "")

    def fingerprint(self) -> str:
        """SHA-256 of all weights and settings the taps depend on; computed once, since they are frozen."""
        if self._fingerprint is None:
            positions = getattr(self.config, "position_embedding_type", None)
            settings = (self.config.model_type, self.block_spec, positions)
            self._fingerprint = fingerprint({"embedding": self.embedding, "blocks": self.blocks}, settings)
        return self._fingerprint

    def weight_bytes(self) -> int:
        """Bytes that the frozen weights and buffers take."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(storage.nbytes() for storage in {t.data_ptr(): t.untyped_storage() for t in tensors}.values())

    def with_taps(self, indices: Sequence[int]) -> FrozenBackbone:
        """The same frozen model, tapped at other blocks; weights and fingerprint are shared."""
        other = FrozenBackbone(self.model, self.family, tuple(indices), self.precision)
        other._fingerprint = self._fingerprint
        return other

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode, whatever mode is asked for: a frozen model has no dropout."""
        return super().train(False)

    def forward(self, *, packed: bool = False, **inputs: Any) -> BackboneOutput:
        """Run the model once on transformers' inputs (input_ids, attention_mask, token_type_ids ...) and keep its taps.

        attention_mask: (B, S), nonzero where a token is; without it every position is one.
        packed: give (tokens, D) instead of (B, S, D).
        """
        shape = next((tuple(v.shape[:2]) for k, v in inputs.items() if k in ("input_ids", "inputs_embeds")), (1, 1))
        mask = _check_mask(inputs.get("attention_mask"), shape)
        if 0 in shape:
            return self._empty(shape, packed)
        if self.model.training:  # the caller's own handle on the shared model may have switched it
            self.train(False)
        with torch.no_grad(), self._capture() as seen:
            last = self.model(**inputs).last_hidden_state
        taps = tuple(seen[index] for index in self.tap_indices)
        if packed:
            return _pack(seen["embedding"], taps, last, mask)
        _zero_padding((seen["embedding"], *taps, last), mask)
        return BackboneOutput(seen["embedding"], taps, last)

    def _empty(self, shape: tuple[int, int], packed: bool) -> BackboneOutput:
        """No token at all: transformers' own attention cannot reshape it."""
        weight = next(self.model.parameters())
        nothing = weight.new_zeros(*((0,) if packed else shape), self.block_spec.width)
        bounds = torch.zeros(shape[0] + 1, dtype=torch.int32, device=weight.device) if packed else None
        return BackboneOutput(nothing, (nothing,) * len(self.tap_indices), nothing, bounds)

    @contextmanager
    def _capture(self) -> Iterator[dict[Any, torch.Tensor]]:
        """Forward hooks for the time of one call: the caller's model is left as it was.

        They see this thread's call alone: others may run the shared model at the same time.
        """
        seen: dict[Any, torch.Tensor] = {}
        thread = threading.get_ident()

        def keep(key: Any) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if threading.get_ident() == thread:
                    seen[key] = output[0] if isinstance(output, tuple) else output

            return hook

        points = [("embedding", self.embedding), *((i, self.blocks[i]) for i in self.tap_indices)]
        handles = [module.register_forward_hook(keep(key)) for key, module in points]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def extra_repr(self) -> str:
        """One line for print(): what is tapped, and how."""
        return f"family={self.config.model_type}, precision={self.precision}, taps={list(self.tap_indices)}"


def freeze(
    model: nn.Module, precision: str = "fp32", taps: str | Sequence[int] = "all", calibration: Iterable | None = None
) -> FrozenBackbone:
    """Freeze a transformers model and tap its blocks.

    model: a BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT or DistilBERT model, with or without a task head (the head
        is not run). Its parameters are shared, get requires_grad=False, and the model goes to eval mode, as in peft.
    precision: "fp32": the model's own float32 weights.
    taps: "all", or indices of the blocks whose outputs are wanted; negative ones count from the end.
    calibration: only for quantised precisions, of which there are none yet; must be None.
    Raises ValueError for an unknown family, precision or block, and TypeError for a model in another dtype.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not available; allowed: {', '.join(map(repr, PRECISIONS))}")
    if calibration is not None:
        raise ValueError("calibration: only quantised precisions are calibrated, and fp32 is not; pass None")
    if isinstance(model, FrozenBackbone):
        raise TypeError("model: is already frozen; use it as it is, or with_taps() for other blocks")
    family = find_family(model)
    base: Any = getattr(model, "base_model", model)
    if getattr(base.config, "is_decoder", False):
        raise ValueError("model: config.is_decoder is True; tlfast taps encoders. Load it with is_decoder=False")
    wrong = next(((n, p.dtype) for n, p in base.named_parameters() if p.dtype != torch.float32), None)
    if wrong is not None:
        raise TypeError(
            f'model: {wrong[0]} is {wrong[1]}, but precision="fp32" takes torch.float32; call model.float()'
        )
    indices = resolve_layers("taps", taps, len(submodule(base, family.blocks)))
    return FrozenBackbone(base.requires_grad_(False), family, indices, precision)


def resolve_layers(argument: str, layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Turn "all" or a list of indices (negative from the end) into sorted block indices; ValueError if out of range."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'{argument}: {layers!r} is not allowed; pass "all" or a list of block indices')
        return tuple(range(count))
    if isinstance(layers, int) or not hasattr(layers, "__iter__"):
        raise ValueError(f'{argument}: {layers!r} is not a list; pass "all" or a list of block indices')
    layers = list(layers)
    if not layers:
        raise ValueError(f'{argument}: the list is empty; pass "all" or at least one block index')
    for index in layers:
        if not hasattr(index, "__index__") or not -count <= operator.index(index) < count:
            raise ValueError(f"{argument}: {index!r} is not a block; the model has blocks 0 to {count - 1}")
    return tuple(sorted({operator.index(index) % count for index in layers}))


def _check_mask(mask: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask: got {tuple(mask.shape)}; pass (B, S) = {shape}, nonzero where a token is")
    return mask.bool()


def _zero_padding(tensors: Iterable[torch.Tensor], mask: torch.Tensor | None) -> None:
    """In place: the forward is over, so nothing reads these values again, and they belong to this call alone."""
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
        return
    padding = ~mask[..., None]
    for tensor in tensors:
        tensor.masked_fill_(padding, 0)


def _pack(
    embedding: torch.Tensor, taps: tuple[torch.Tensor, ...], last: torch.Tensor, mask: torch.Tensor | None
) -> BackboneOutput:
    if mask is None:
        mask = torch.ones(embedding.shape[:2], dtype=torch.bool, device=embedding.device)
    bounds = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    bounds[1:] = mask.sum(dim=1).cumsum(dim=0)
    return BackboneOutput(embedding[mask], tuple(tap[mask] for tap in taps), last[mask], bounds)
