"""What the ladder stands beside: full fine-tuning, LoRA, and a linear probe, traced through transformers' own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import work
from .lora import Adapted, add_lora
from .outline import CLASSIFICATION, Outline, exchange, last_hidden_state, shortened
from .row import Row
from .tracing import Traced, trace, trace_saved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOAT, ADAMW = 4, 8  # bytes a trained number: it or its gradient, and the optimizer's two moments of it
_FEW = 2  # blocks that are traced; all others are as the last of them


def peer_rows(outline: Outline, dtypes: Sequence[str], rank: int, targets: Sequence[str] | None = None) -> list[Row]:
    """Rows of full fine-tuning, linear probe (of classifiers), LoRA, and LoRA with checkpointing, in each of DTYPES.

    outline: its model is changed, and not to be used afterwards. dtypes: "fp32", or "bf16": frozen weights in bfloat16,
    trained ones in float32, under autocast. targets: names of the linear layers that LoRA adapts; None: queries and
    values, as in peft. Trained by AdamW in float32.
    Raises ValueError where targets are not known, or name no linear layer.
    """
    chosen = _query_and_value(outline) if targets is None else list(targets)
    blocks, head = work.frozen_blocks(outline), work.head(outline)
    with outline.mode:
        model = _Classifier(outline) if outline.job.task in CLASSIFICATION else outline.model
        model.requires_grad_(True)
        rows = [_row(outline, model, "full fine-tuning", dtype, 3.0) for dtype in dtypes]
        outline.model.requires_grad_(False)
        if outline.job.task in CLASSIFICATION:
            for dtype in dtypes:
                _cast(outline.model, DTYPES[dtype])
                rows.append(_row(outline, model, "linear probe", dtype, 1.0))
        if not add_lora(outline.model, rank, chosen):
            raise ValueError(f"targets: no linear layer is called {' or '.join(chosen)}; pass names this model has")
        recomputed = (3 * blocks + 2 * head) / (blocks + head)
        for dtype in dtypes:
            _cast(outline.model, DTYPES[dtype])
            rows.append(_row(outline, model, f"LoRA r={rank}", dtype, 2.0))
            if outline.model.supports_gradient_checkpointing:
                with _checkpointing(outline.model):
                    rows.append(_row(outline, model, f"LoRA r={rank}, checkpointing", dtype, recomputed))
    return rows


class _Classifier(nn.Module):
    """A linear layer on the model's last hidden states, or on their mean."""

    def __init__(self, outline: Outline) -> None:
        super().__init__()
        self._outline, self.base = outline, outline.model
        self.classifier = nn.Linear(outline.output_width, outline.job.labels)

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        job = self._outline.job
        last = last_hidden_state(self._outline, inputs)
        one_a_token = job.task == "token-classification"
        logits = self.classifier(last if one_a_token else last.mean(dim=1))
        labels = torch.empty(logits.shape[:-1], dtype=torch.int64)
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten()), logits


def _query_and_value(outline: Outline) -> list[str]:
    """Names of the layers that make queries and values, as the table of families has them."""
    parts, block = outline.last.parts, outline.last.blocks[0]
    if parts is None:
        raise ValueError("targets: this model is not in the table of families; name the linear layers to adapt")
    names = {path: path for path, _ in block.named_modules()}
    paths = [path.partition("[")[0] for path in (parts.attention.query, parts.attention.value)]
    found = [next(path for path in alternatives.split("|") if path in names) for alternatives in paths]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in found))


def _row(outline: Outline, model: nn.Module, method: str, dtype: str, forwards: float) -> Row:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    traced = _whole(outline, model, dtype)
    optimizer = ADAMW * trained
    return Row(
        method=method,
        setting={"precision": dtype},
        trained=trained,
        weights=weights,
        saved=traced.saved,
        gradients=FLOAT * trained,
        optimizer=optimizer,
        peak=traced.peak + optimizer,
        forwards=forwards,
    )


def _whole(outline: Outline, model: nn.Module, dtype: str) -> Traced:
    """The trace of a step; a deep model's from that of its first blocks, of which the last stands for all others."""
    inputs = outline.inputs()
    few = {name: min(len(stack.blocks), _FEW) for name, stack in outline.stacks.items()}

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            result = model(**inputs)
        return result if isinstance(result, tuple) else (result.loss, result)

    model.train()
    with shortened(outline.stacks, few):
        traced = trace(model, inputs, forward)
    saved, peak = traced
    for name, stack in outline.stacks.items():
        more = len(stack.blocks) - few[name]
        if more:
            with shortened(outline.stacks, few | {name: _FEW - 1}):
                step = traced.saved - trace_saved(model, inputs, forward)
            gradients = sum(p.nbytes for p in stack.blocks[_FEW - 1].parameters() if p.requires_grad)
            # the most is held when the backward begins, or when it ends and all gradients are there
            saved, peak = saved + more * step, peak + more * max(step, gradients)
    return Traced(saved, peak)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the frozen weights another dtype."""
    adapters = {id(p) for module in model.modules() if isinstance(module, Adapted) for p in module.adapter()}

    def make(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in adapters or not isinstance(tensor, nn.Parameter):
            return tensor
        return nn.Parameter(torch.empty(tensor.shape, dtype=dtype), requires_grad=False)

    exchange(model, make)


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Blocks recompute in the backward pass; the state of the random numbers has no memory and is not kept."""
    uses_cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    if uses_cache:  # transformers would say on every forward that it cannot
        model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        if uses_cache:
            model.config.use_cache = uses_cache
