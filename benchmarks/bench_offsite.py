"""Offsite-tuning with MiniLM on SST-2 and TREC, what its training costs, and a small language model of code.

MiniLM: adapter 1,1; one bundle a recipe, distilled on the owner's general texts (owner_texts.py), five seeds of tuning
on it, and alignment of what came back on the same texts; without distillation, and with a low-rank middle, fewer seeds.
The probe, and the same two blocks tuned in the full model, are what the plugged model stands between. The epoch is
chosen on dev by the emulator's score; test files are read once, after that. A seed takes many minutes, so each is kept
in .benchmarks/offsite.json, and a suite that was broken off goes on from there; remove that file to tune anew.
Language: a byte-level GPT-2 pre-trained here on Python sources, which are also what it is distilled on; the data owner
has the prose of PyTorch's docstrings, split by file. The labelled data of the first part are in $TLFAST_DATA/text.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlfast
from benchmarks import offsite as parties
from benchmarks import pretrain
from benchmarks.kept import kept
from benchmarks.loop import Columns, mean_loss, shuffled_batches, train
from benchmarks.owner_texts import owner_texts
from benchmarks.runs import text_files
from tlfast import offsite, training
from tlfast.bench import measure
from tlfast.bench.probe import fit_probe
from tlfast.cli.backbone import load_backbone
from tlfast.offsite.comparison import EMULATOR, FULL, PLUGGED, ZERO

SEEDS, UNDISTILLED_SEEDS, THIN_SEEDS = range(5), range(2), range(1)
ADAPTER, KEPT, THIN = (1, 1), "keep:2", "svd:96"
DISTILLED, DISTIL_RATE = 1500, 5e-4  # steps
ALIGNED, ALIGN_RATE = 750, 5e-4  # steps
MOST_TOKENS = 64
EPOCHS, RATE = {"sst2": 2, "trec": 3}, 1e-4
NOT_ALIGNED = "plug-in, not aligned"

LORA, STEP_BATCH, STEP_TOKENS, ROUNDS = "LoRA r=8 on the full model", 16, 64, 5

GPT2 = {"width": 320, "layers": 8, "heads": 5, "steps": 400}  # 10 million parameters
GPT2_ADAPTER, GPT2_KEPT, GPT2_STEPS, GPT2_DISTILLED = (2, 2), "keep:2", 120, 200
GPT2_BATCH, GPT2_RATE = 8, 1e-3
TEST_FILES, TRAIN_FILES = 60, 400
MIB = 2**20


@functools.cache
def _minilm() -> Any:
    """MiniLM without dropout, and its tokenizer."""
    loaded = load_backbone("minilm")
    loaded.model.config.hidden_dropout_prob = loaded.model.config.attention_probs_dropout_prob = 0.0
    return loaded


@functools.cache
def _owners_texts() -> Any:
    """The owner's texts, in batches."""
    return parties.texts_as_batches(owner_texts(), _minilm().tokenizer, MOST_TOKENS, seed=0)


@functools.cache
def _bundle(recipe: str, distilled: bool) -> offsite.Bundle:
    """What the owner of MiniLM sends."""
    distillation = offsite.Distillation(_owners_texts(), DISTILLED, DISTIL_RATE) if distilled else None
    return parties.bundle(_minilm().model, ADAPTER, recipe, distillation)


def _recipes(seed: int) -> list[tuple[str, bool]]:
    """What is tuned with this seed: an emulator, and whether it is distilled."""
    more = [(KEPT, False)] * (seed in UNDISTILLED_SEEDS) + [(THIN, True)] * (seed in THIN_SEEDS)
    return [(KEPT, True), *more]


def _one_seed(task: str, seed: int) -> dict[str, Any]:
    loaded = _minilm()
    data = parties.read(text_files(task), loaded.tokenizer, loaded.max_length, seed)
    settings = training.Settings(EPOCHS[task], 32, (RATE,), seed=seed)
    probe = fit_probe(tlfast.freeze(copy.deepcopy(loaded.model)), data.data)
    found: dict[str, Any] = {"probe": training.evaluate(probe, data.test, data.data.collate, data.data.scoring)}
    for recipe, distilled in _recipes(seed):
        sent = _bundle(recipe, distilled)
        tuned = parties.tune(sent, data, settings)
        models = parties.stages(loaded.model, sent, tuned, data)
        models[NOT_ALIGNED] = models[PLUGGED]
        alignment = offsite.Distillation(_owners_texts(), ALIGNED, ALIGN_RATE)
        models[PLUGGED] = parties.stages(loaded.model, sent, tuned, data, alignment)[PLUGGED]
        if len(found) == 1:  # the same for every bundle
            models[FULL] = parties.tune_full(loaded.model, sent, tuned, data, settings)
        found[_name(recipe, distilled)] = parties.compare(models, data).to_dict()
    return found


def _name(recipe: str, distilled: bool) -> str:
    return f"{recipe}, distilled" if distilled else recipe


def _mean(runs: list[dict[str, Any]], recipe: str, stage: str) -> float:
    """In percent, over the runs that have the recipe."""
    return 100 * statistics.mean(run[recipe]["scores"][stage] for run in runs if recipe in run)


def _beside_others(runs: list[dict[str, Any]]) -> str:
    """The scores with the other bundles, and with the first one on the same seeds."""
    parts, ours = [], _name(KEPT, True)
    for recipe, what in ((_name(KEPT, False), f"{KEPT}, not distilled,"), (_name(THIN, True), _name(THIN, True))):
        same = [run for run in runs if recipe in run]
        scores = [_mean(same, name, PLUGGED) for name in (recipe, ours)]
        parts.append(f"{what} {scores[0]:.1f} % where {ours} has {scores[1]:.1f} % (seeds: {len(same)})")
    return "; ".join(parts)


@pytest.mark.parametrize("task", ["sst2", "trec"])
def test_plug_in(benchmark: Any, task: str) -> None:
    def run() -> list[dict[str, Any]]:
        return [kept("offsite", f"{task} {seed}", lambda seed=seed: _one_seed(task, seed)) for seed in SEEDS]

    runs, recipe = benchmark.pedantic(run, rounds=1), _name(KEPT, True)
    probe = 100 * statistics.mean(run["probe"]["accuracy"] for run in runs)
    full, plugged = (_mean(runs, recipe, stage) for stage in (FULL, PLUGGED))
    gaps, lows, highs = zip(*([100 * x for x in run[recipe]["plug-in minus"][EMULATOR]] for run in runs), strict=True)
    benchmark.extra_info.update(runs=runs, recovered=(plugged - probe) / (full - probe))
    benchmark.extra_info["row"] = {
        "what": f"Offsite-tuning of MiniLM on {task.upper()}, adapter 1,1, {recipe}, aligned, {len(runs)} seeds: "
        "test accuracy of the plugged model (of the gain in the full model), less the emulator's (seeds' intervals)",
        "ours": f"{plugged:.1f} % ({(plugged - probe) / (full - probe):.0%}); {statistics.mean(gaps):+.1f} points "
        f"({min(lows):+.1f} to {max(highs):+.1f})",
        "peer": f"linear probe {probe:.1f} %, the same blocks tuned in the full model {full:.1f} %; "
        f"not aligned {_mean(runs, recipe, NOT_ALIGNED):.1f} %; {_beside_others(runs)}",
        "how": "tlfast bench offsite",
    }


def _tunables() -> dict[str, nn.Module]:
    """What trains: LoRA on all blocks of the full model, and each method on a bundle of keep:2."""
    full, spec = _minilm().model, offsite.TaskSpec("sequence-classification", 2, "single_label_classification")
    sent = _bundle(KEPT, False)
    everything = offsite.BlockMap(sent.blocks.total, (sent.blocks.total - 1, 1), ())
    models = {LORA: offsite.tunable(full, everything, spec, offsite.Method("lora"))}
    for name in ("full", "lora"):
        models[f"bundle, {name}"] = offsite.tunable(sent.model, sent.blocks, spec, offsite.Method(name))
    for reduction in (8, 16):
        method = offsite.Method("ladder", ladder={"reduction": reduction})
        ladder: Any = offsite.tunable(sent.model, sent.blocks, spec, method)
        ladder.calibrate([_step_inputs()])
        models[f"bundle, ladder r={reduction}"] = ladder
    return models


def _step_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (STEP_BATCH, STEP_TOKENS)
    ids = torch.randint(1000, 20_000, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def test_cost_of_a_step(benchmark: Any) -> None:
    models, batch = _tunables(), _step_inputs() | {"labels": torch.arange(STEP_BATCH) % 2}
    saved = {name: measure.saved_bytes(lambda model=model: model.train()(**batch)) for name, model in models.items()}

    def step(model: nn.Module) -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    steps = {name: functools.partial(step, model) for name, model in models.items()}
    seconds = benchmark.pedantic(lambda: measure.timed_rounds(steps, ROUNDS), rounds=1)
    times = measure.medians(seconds)
    benchmark.extra_info.update(saved_bytes=saved, seconds=times)
    figures = [
        f"{name} {saved[LORA] / saved[name]:.1f} x less, {times[LORA] / times[name]:.2f} x as fast"
        for name in models
        if name != LORA
    ]
    benchmark.extra_info["row"] = {
        "what": f"Saved for backward and time of a step of offsite-tuning, MiniLM, adapter 1,1, {KEPT}, "
        f"{STEP_BATCH} x {STEP_TOKENS}",
        "ours": "; ".join(figures),
        "peer": f"{LORA}: {saved[LORA] / MIB:.1f} MiB, {1e3 * times[LORA]:.0f} ms",
        "how": "tlfast bench offsite",
    }


def _language(full: Any, train_data: Columns, test: Columns, distilled: bool) -> dict[str, float]:
    """Perplexity a byte on the test of each stage."""
    distillation = None
    if distilled:
        sources = pretrain.blocks(pretrain.python_sources(), GPT2_DISTILLED * GPT2_BATCH)["input_ids"]
        batches = [{"input_ids": rows} for rows in sources.split(GPT2_BATCH)]
        distillation = offsite.Distillation(batches, GPT2_DISTILLED, DISTIL_RATE)
    sent = parties.bundle(full, GPT2_ADAPTER, GPT2_KEPT, distillation)
    spec = offsite.TaskSpec("causal-lm")
    middle = tuple(range(GPT2_ADAPTER[0], GPT2["layers"] - GPT2_ADAPTER[1]))
    whole = dataclasses.replace(sent, model=full, blocks=offsite.BlockMap(GPT2["layers"], GPT2_ADAPTER, middle))
    tuned = {}
    for name, side in ((EMULATOR, sent), (FULL, whole)):
        tuned[name] = offsite.tunable(side.model, side.blocks, spec, parties.METHOD)
        batches_of_prose = shuffled_batches(train_data, GPT2_BATCH, GPT2_STEPS)
        train(tuned[name], batches_of_prose, GPT2_STEPS, GPT2_RATE, autocast=True)
    with tempfile.TemporaryDirectory() as folder:
        offsite.save_adapter(Path(folder), tuned[EMULATOR], sent, spec, parties.METHOD)
        plugged = offsite.plug(full, folder)
    models = {ZERO: full, EMULATOR: tuned[EMULATOR], PLUGGED: plugged, FULL: tuned[FULL]}
    return {name: math.exp(mean_loss(model, test)) for name, model in models.items()}


@pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])
def test_language(benchmark: Any, distilled: bool) -> None:
    test, train_data = map(pretrain.blocks, pretrain.torch_prose((TEST_FILES, TRAIN_FILES)))
    full = _gpt2()
    found = benchmark.pedantic(_language, (full, train_data, test, distilled), rounds=1)
    size = f"{full.num_parameters() / 1e6:.1f} M parameters"
    order = found[ZERO] > found[EMULATOR] > found[PLUGGED] > found[FULL]
    benchmark.extra_info.update(perplexity=found, order_holds=order, parameters=full.num_parameters())
    benchmark.extra_info["row"] = {
        "what": f"Perplexity a byte on held-out prose, byte-level GPT-2 of code with {size}, "
        f"adapter 2,2, {GPT2_KEPT}{' distilled' if distilled else ''}, {GPT2_STEPS} steps of "
        f"{GPT2_BATCH} x {pretrain.CONTEXT}",
        "ours": f"emulator {found[EMULATOR]:.3f}, plug-in {found[PLUGGED]:.3f}; the paper's order "
        f"{'holds' if order else 'does not hold'}",
        "peer": f"before {found[ZERO]:.3f}, the same blocks tuned in the full model {found[FULL]:.3f}",
        "how": "tlfast bench offsite",
    }


@functools.cache
def _gpt2() -> Any:
    return pretrain.byte_gpt2(**GPT2)
