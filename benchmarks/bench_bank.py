"""A bank of eight ladders beside one LadderModel: MiniLM-L6, float32, full-length tokens.

One LadderModel, the bank, and eight ladders climbing one frozen forward in turn run interleaved in one process; the
figure is the median of the rounds, with the fastest round beside it, which a busy machine changes less.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel

import tlfast
from benchmarks.peers import text_batch
from tlfast.bench.measure import medians, timed_rounds
from tlfast.cli.backbone import MINILM, find_backbone

LADDERS = 8
SHAPES = {(1, 16): 101, (32, 32): 21, (16, 128): 15}  # (batch, tokens): rounds


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", [8, 4])
def test_bank(benchmark: Any, reduction: int, shape: tuple[int, int]) -> None:
    backbone = tlfast.freeze(AutoModel.from_pretrained(find_backbone(MINILM)))
    config = tlfast.LadderConfig(reduction=reduction, init="random")
    ladders = {f"task {i}": tlfast.LadderModel(backbone, config=config).eval() for i in range(LADDERS)}
    bank = tlfast.LadderBank(ladders, backbone)
    inputs = {name: value for name, value in text_batch(*shape).items() if name != "labels"}
    one = ladders["task 0"]

    @torch.no_grad()
    def alone() -> torch.Tensor:
        return one(**inputs).logits

    @torch.no_grad()
    def climbing() -> list[torch.Tensor]:
        output = one.backbone(**inputs)
        return [ladder.climb(output, inputs["attention_mask"]) for ladder in ladders.values()]

    for result, logits in zip(bank(**inputs).values(), climbing(), strict=True):
        torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-5)
    functions = {"one ladder": alone, "bank": lambda: bank(**inputs), "climb in turn": climbing}
    rounds = timed_rounds(functions, SHAPES[shape])
    benchmark.pedantic(functions["bank"], rounds=3)

    seconds, fastest = medians(rounds), {name: min(times) for name, times in rounds.items()}
    times_one = {name: seconds[name] / seconds["one ladder"] for name in ("bank", "climb in turn")}
    best = {name: fastest[name] / fastest["one ladder"] for name in times_one}
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["fastest_seconds"] = fastest
    benchmark.extra_info["times_one_ladder"] = times_one
    benchmark.extra_info["row"] = {
        "what": f"Bank of {LADDERS} ladders, in forwards of one; MiniLM-L6, {shape[0]} x {shape[1]}, r={reduction}",
        "ours": f"{times_one['bank']:.2f} (fastest {best['bank']:.2f}; {1e3 * seconds['bank']:.1f} ms)",
        "peer": f"climb in turn {times_one['climb in turn']:.2f} (fastest {best['climb in turn']:.2f})",
        "how": "tlfast bench bank",
    }
