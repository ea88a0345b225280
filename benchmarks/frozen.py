"""What the suites of the frozen forward share: models with batches, errors of taps, the machine's own GEMM rates."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer

import tlfast
from benchmarks.peers import bert_base, text_batch
from benchmarks.runs import text_files
from tlfast.backbone import FrozenBackbone
from tlfast.bench.measure import medians, timed_rounds
from tlfast.cli.backbone import MINILM, find_backbone
from tlfast.data import read_examples

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
# transformers has no int8 or nf4 of its own on a CPU; its bf16 is what they have to beat
PEER = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16", "nf4": "bf16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model in float32 and the batches it reads; make() gives the model anew, with the same weights."""

    name: str
    make: Callable[[], Any]
    batches: list[Batch]
    lengths_vary: bool
    rounds: int

    @property
    def tokens(self) -> int:
        """Tokens of all batches, without padding."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)


def minilm() -> Any:
    """MiniLM-L6 as its package has it."""
    return AutoModel.from_pretrained(find_backbone(MINILM)).eval()


@functools.cache
def case(name: str) -> Case:
    """ "minilm": all SST-2 test sentences by 32, the longest first; "bert-base": its dimensions, 16 x 128 tokens."""
    if name == "bert-base":
        batch = text_batch()
        del batch["labels"]
        return Case("bert-base dimensions, 16 x 128", bert_base, [batch], False, 9)
    texts = read_examples(text_files("sst2")["test"]).texts
    tokenizer = AutoTokenizer.from_pretrained(find_backbone(MINILM))
    rows = sorted(tokenizer(texts, truncation=True)["input_ids"], key=len, reverse=True)
    batches = [
        dict(tokenizer.pad({"input_ids": rows[start : start + 32]}, return_tensors="pt"))
        for start in range(0, len(rows), 32)
    ]
    return Case("MiniLM-L6, SST-2 test, batch 32", minilm, batches, True, 5)


def freeze_or_reason(model: nn.Module, precision: str) -> FrozenBackbone | str:
    """The frozen model, or why this version or this machine does not freeze it at that precision."""
    try:
        return tlfast.freeze(model, precision=precision)
    except ValueError as error:
        return str(error)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a transformers model's parameters, without the pooler, which no tap needs."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not name.startswith("pooler."))


def hidden_states(model: Callable[..., Any], batch: Batch) -> list[torch.Tensor]:
    """The blocks' outputs (T, D) of a transformers model, without padding; it reads every one."""
    mask = batch["attention_mask"].bool()
    return [hidden[mask] for hidden in model(**batch, output_hidden_states=True).hidden_states[1:]]


class TapErrors:
    """Collects ||tap - exact|| / ||exact|| of every layer over batches; `worst` is that of the worst layer."""

    def __init__(self) -> None:
        self.sums: dict[int, tuple[float, float]] = {}

    def add(self, taps: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
        """Taps (T, D) of one batch and the float64 model's."""
        for layer, (tap, truth) in enumerate(zip(taps, exact, strict=True)):
            wrong, whole = self.sums.get(layer, (0.0, 0.0))
            self.sums[layer] = (
                wrong + float((tap.double() - truth).square().sum()),
                whole + float(truth.square().sum()),
            )

    @property
    def worst(self) -> float:
        """The largest of the layers' relative errors."""
        return max((wrong / whole) ** 0.5 for wrong, whole in self.sums.values())


def gemm_shapes(width: int, hidden: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's products: query, key and value in one, output, and the feed-forward's two."""
    return [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]


def gemm_flops(tokens: int, layers: int, width: int, hidden: int) -> int:
    """Of all linear layers; attention's own products are not in it."""
    return 2 * tokens * layers * sum(inputs * outputs for inputs, outputs in gemm_shapes(width, hidden))


@torch.no_grad()
def gemm_rates(tokens: int, width: int, hidden: int, rounds: int = 15) -> dict[str, float]:
    """Flops a second of PyTorch's own products at these shapes: F.linear in fp32 and bf16, torch._int_mm in int8.

    A block's four one after the other; of int8's two layouts of a weight the faster one.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = gemm_shapes(width, hidden)
    pairs = [(torch.randn(tokens, i, generator=generator), torch.randn(o, i, generator=generator)) for i, o in shapes]
    halves = [(x.bfloat16(), w.bfloat16()) for x, w in pairs]
    whole = [tuple(t.mul(30).clamp(-127, 127).to(torch.int8) for t in pair) for pair in pairs]
    rows = [(x, w.t().contiguous()) for x, w in whole]
    functions = {
        "fp32": lambda: [F.linear(x, w) for x, w in pairs],
        "bf16": lambda: [F.linear(x, w) for x, w in halves],
        "int8": lambda: [torch._int_mm(x, w.t()) for x, w in whole],
        "int8, rows": lambda: [torch._int_mm(x, w) for x, w in rows],
    }
    seconds = medians(timed_rounds(functions, rounds))
    seconds["int8"] = min(seconds["int8"], seconds.pop("int8, rows"))
    return {name: gemm_flops(tokens, 1, width, hidden) / value for name, value in seconds.items()}


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = fn()
    return result, time.perf_counter() - start
