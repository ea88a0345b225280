"""What the side network adds to each generated token: GPT-2 dimensions (124M), random weights, greedy, cached, float32.

The ladder, on all blocks, and its bare backbone take transformers' own generate() with the same arguments, interleaved
in one process. A ladder that has not been trained writes what its backbone writes, which is checked first.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tlfast
from benchmarks.peers import REDUCTION
from tlfast.bench.measure import medians, timed_rounds

ROUNDS, PROMPT, NEW = 7, 32, 64


@functools.cache
def models() -> tuple[GPT2LMHeadModel, tlfast.LadderModel]:
    """The backbone, which never ends a text of its own accord, and a ladder on it."""
    torch.manual_seed(0)
    backbone = GPT2LMHeadModel(GPT2Config()).eval()
    backbone.generation_config.eos_token_id = None
    config = tlfast.LadderConfig(reduction=REDUCTION, init="random")
    return backbone, tlfast.LadderModel(tlfast.freeze(backbone), task="causal-lm", config=config).eval()


@pytest.mark.parametrize("batch", [1, 4])
def test_generation(benchmark: Any, batch: int) -> None:
    backbone, ladder = models()
    prompt = torch.randint(backbone.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False}
    functions = {
        "ladder": lambda: ladder.generate(prompt, **settings),
        "backbone": lambda: backbone.generate(prompt, **settings),
    }
    written = functions["ladder"]()
    assert written.shape == (batch, PROMPT + NEW)
    assert torch.equal(written, functions["backbone"]())

    rounds = timed_rounds(functions, ROUNDS)
    benchmark.pedantic(functions["ladder"], rounds=1)
    milliseconds = {name: 1e3 * seconds / NEW for name, seconds in medians(rounds).items()}
    ratios = [ours / theirs for ours, theirs in zip(rounds["ladder"], rounds["backbone"], strict=True)]
    extra = milliseconds["ladder"] / milliseconds["backbone"] - 1
    benchmark.extra_info["milliseconds_per_token"] = milliseconds
    benchmark.extra_info["extra_over_backbone"] = extra
    benchmark.extra_info["extra_round_by_round"] = statistics.median(ratios) - 1
    benchmark.extra_info["row"] = {
        "what": f"Time a token, GPT-2 124M, batch {batch}, prompt {PROMPT}, {NEW} new tokens, r=8, all blocks, fp32",
        "ours": f"{milliseconds['ladder']:.1f} ms ({100 * extra:+.0f} %)",
        "peer": f"the backbone alone {milliseconds['backbone']:.1f} ms",
        "how": "tlfast bench generation",
    }
