"""Epochs from a cache of taps: how long they take, what they do to accuracy, and what kill -9 does to a run on one.

MiniLM-L6 on SST-2, reduction 4, batch 32, products of the side network in bf16 whatever the forward is in; the data are
in $TLFAST_DATA/text.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlfast
from benchmarks.runs import REDUCTION, text_files, train_ladder
from tlfast import training
from tlfast.backbone import BackboneOutput
from tlfast.cli import main
from tlfast.cli.backbone import load_backbone
from tlfast.data import LengthBuckets

BATCH, RATE, LARGEST_GRADIENT = 32, 1e-3, 1.0
SIDE = "bf16"
CHUNK = 31  # batches that one method trains on before the next has its turn
SEEDS = (0, 1, 2, 3, 4)
BACKBONE, KILLS, KILL_ROWS, KILL_EPOCHS = "minilm", 20, 1200, 2  # of the runs that are killed

Batches = Callable[[list[list[int]]], Iterator[dict[str, Any]]]


def _data() -> tuple[Any, training.TaskData]:
    loaded, files = load_backbone("minilm"), text_files("sst2")
    task = training.TextTask(loaded.max_length, "minilm")
    return loaded, training.load_data(task, files["train"], files["dev"], loaded.tokenizer, 0)[1]


def _ladder(model: nn.Module, precision: str, data: training.TaskData) -> tlfast.LadderModel:
    torch.manual_seed(0)
    config = tlfast.LadderConfig(reduction=REDUCTION, side_precision=SIDE)
    frozen = tlfast.freeze(model, precision=precision)
    return tlfast.LadderModel(frozen, config=config, calibration=training.calibration_batches(data, 0)).train()


def _steps(ladder: tlfast.LadderModel) -> Callable[[Iterator[dict[str, Any]]], None]:
    """Training steps as transformers' Trainer makes them: clipped gradients, AdamW."""
    trained = [parameter for parameter in ladder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def run(batches: Iterator[dict[str, Any]]) -> None:
        for batch in batches:
            ladder(**batch).loss.backward()
            nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _one_ahead(data: training.TaskData) -> Batches:
    """Batches, each collated before the one in front of it is trained on, as accelerate's loader does."""

    def batches(chunk: list[list[int]]) -> Iterator[dict[str, Any]]:
        made = (data.collate([data.train[i] for i in samples]) for samples in chunk)
        for batch, _ in itertools.pairwise(itertools.chain(made, [None])):
            yield batch

    return batches


def _own_forward(model: Any, batches: Batches) -> Batches:
    """Batches with the taps from transformers' own forward."""

    def seen(chunk: list[list[int]]) -> Iterator[dict[str, Any]]:
        for batch in batches(chunk):
            with torch.no_grad():
                labels = batch.pop("labels")
                out = model(**batch, output_hidden_states=True)
            embedding, *taps = out.hidden_states
            output = BackboneOutput(embedding, tuple(taps), out.last_hidden_state)
            yield {"attention_mask": batch["attention_mask"], "labels": labels, "backbone_output": output}

    return seen


def _drop_pages(folder: Path) -> None:
    """Take files out of the system's page cache, so that they are read from the disk."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _on_cache(loaded: Any, data: training.TaskData, precision: str, storage: str, folder: Path) -> tuple[Any, Any]:
    """A ladder and batches from a cache that was filled and then dropped from memory."""
    ladder = _ladder(load_backbone("minilm").model, precision, data)
    identity = {"fingerprint": ladder.backbone.fingerprint(), "precision": precision}
    reader = training.TapReader(ladder.look, identity, torch.device("cpu"))
    cached, report = training.on_cache(data, folder, reader, storage)
    _drop_pages(folder)
    return (_one_ahead(cached), _steps(ladder)), report


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise, by which the page cache is dropped")
def test_epoch(benchmark, tmp_path):
    """One epoch of each, interleaved by chunks; the cached ones read every sample once, from the disk."""
    loaded, data = _data()
    exact, report = _on_cache(loaded, data, "bf16", "exact", tmp_path / "exact")
    small, small_report = _on_cache(loaded, data, "bf16", "int8", tmp_path / "int8")
    plain = _one_ahead(data)
    fp32, bf16 = load_backbone("minilm").model.eval(), load_backbone("minilm").model.eval().bfloat16()
    methods = {
        "cache": exact,
        "int8 cache": small,
        "transformers fp32": (_own_forward(fp32, plain), _steps(_ladder(fp32, "fp32", data))),
        "transformers bf16": (_own_forward(bf16, plain), _steps(_ladder(load_backbone("minilm").model, "fp32", data))),
    }
    order = list(LengthBuckets(data.train.lengths, BATCH, 0))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    seconds: dict[str, list[float]] = {name: [] for name in methods}

    def epoch() -> None:
        for turn, start in enumerate(range(0, len(batches), CHUNK)):
            names = list(methods)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                make, run = methods[name]
                began = time.perf_counter()
                run(make(batches[start : start + CHUNK]))
                seconds[name].append(time.perf_counter() - began)

    benchmark.pedantic(epoch, rounds=1)
    total = {name: sum(values) for name, values in seconds.items()}
    faster = {name: total[name] / total["cache"] for name in methods}
    benchmark.extra_info["seconds"] = total
    benchmark.extra_info["chunks"] = seconds
    benchmark.extra_info["cache"] = {"bytes": report.bytes, "fill_seconds": report.seconds}
    benchmark.extra_info["int8_cache"] = {"bytes": small_report.bytes, "fill_seconds": small_report.seconds}
    benchmark.extra_info["row"] = {
        "what": f"An epoch of a ladder on SST-2, MiniLM-L6, r=4, side in {SIDE}, batch 32, "
        "from a disk cache of bf16 taps, cold",
        "ours": f"{total['cache']:.1f} s ({report.bytes / 2**20:,.0f} MiB); in int8 {total['int8 cache']:.1f} s",
        "peer": f"on transformers' fp32 forward {total['transformers fp32']:.1f} s ({faster['transformers fp32']:.1f} "
        f"times), bf16 {total['transformers bf16']:.1f} s ({faster['transformers bf16']:.1f} times)",
        "how": "tlfast bench epochs",
    }


def test_accuracy(benchmark, tmp_path):
    """The command with and without a cache, the same seeds; the exact one must not differ at all."""
    files = text_files("sst2")
    settings = {"none": (), "exact": ("--cache-storage", "exact"), "int8": ("--cache-storage", "int8")}
    precisions = ("--precision", "bf16", "--side-precision", SIDE)
    runs: list[dict[str, Any]] = []

    def all_seeds() -> None:
        for seed in SEEDS:
            found = {}
            for name, options in settings.items():
                cache = ("--cache", str(tmp_path / name), *options) if options else ()
                metrics = train_ladder(files, seed, tmp_path / f"{name}-{seed}", *precisions, *cache)
                found[name] = {what: metrics[what] for what in ("accuracy", "dev", "test", "epochs", "epoch_seconds")}
            runs.append(found)

    benchmark.pedantic(all_seeds, rounds=1)
    for run in runs:
        assert run["exact"]["test"] == run["none"]["test"] and run["exact"]["dev"] == run["none"]["dev"]
    mean = {name: 100 * statistics.mean(run[name]["accuracy"] for run in runs) for name in settings}
    differences = [100 * (run["int8"]["accuracy"] - run["none"]["accuracy"]) for run in runs]
    benchmark.extra_info["runs"] = runs
    benchmark.extra_info["row"] = {
        "what": "Test accuracy on SST-2 from a cache, MiniLM-L6 in bf16, r=4, "
        f"{runs[0]['none']['epochs']} epochs, {len(SEEDS)} seeds",
        "ours": f"exact {mean['exact']:.2f} % (every run equal to the last bit), int8 {mean['int8']:.2f} % (paired "
        f"differences {', '.join(f'{x:+.2f}' for x in differences)})",
        "peer": f"without a cache {mean['none']:.2f} %",
        "how": f"tlfast ladder train --backbone minilm --reduction 4 {' '.join(precisions)} --cache DIR",
    }


def _command(words: list[str]) -> None:
    """In a process of its own: the command line, with the words as its arguments."""
    import sys

    sys.argv = ["tlfast", *words]
    main()


def _start(words: list[str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tlfast.training", "tlfast.ladder", "transformers.models.bert"])
    process = context.Process(target=_command, args=(words,))
    process.start()
    return process


def test_killed_runs_end_as_an_unbroken_one(benchmark, tmp_path):
    """Each of many runs is killed once, at a random moment of filling or training, and resumed."""
    files = text_files("sst2")
    small = {}
    for name in ("train", "dev", "test"):
        small[name] = tmp_path / f"{name}.tsv"
        lines = files[name].read_text(encoding="utf-8").splitlines(keepends=True)
        small[name].write_text("".join(lines[: 1 + (KILL_ROWS if name == "train" else 200)]), encoding="utf-8")
    common = ["ladder", "train", "--backbone", BACKBONE, "--precision", "bf16", "--json", "--reduction", str(REDUCTION)]
    common += [
        "--epochs",
        str(KILL_EPOCHS),
        *(word for name, path in small.items() for word in (f"--{name}", str(path))),
    ]

    def words(name: str) -> list[str]:
        return [*common, "--out", str(tmp_path / name), "--cache", str(tmp_path / f"{name}-cache")]

    def results(name: str) -> list[Any]:
        metrics = json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8"))
        return [metrics[what] for what in ("train", "dev", "test", "best_epoch")]

    began = time.perf_counter()
    whole = _start(words("whole"))
    while not (tmp_path / "whole-cache").exists():
        time.sleep(0.01)
    before = time.perf_counter() - began
    whole.join()
    assert whole.exitcode == 0
    length = time.perf_counter() - began
    draw = random.Random(0)
    moments: list[float] = []

    def kills() -> None:
        last = length
        for name in (f"run{number}" for number in itertools.count()):
            moment = draw.uniform(before, last)
            process = _start(words(name))
            process.join(moment)
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:  # it had ended: the machine is faster than it was
                last = moment
                continue
            resume = ["--resume"] if (tmp_path / name / "run.json").exists() else []
            again = _start([*words(name), *resume])
            again.join()
            assert again.exitcode == 0, f"killed after {moment:.1f} s, the run did not go on"
            assert results(name) == results("whole"), f"killed after {moment:.1f} s, it ended otherwise"
            moments.append(moment)
            if len(moments) == KILLS:
                return

    benchmark.pedantic(kills, rounds=1)
    benchmark.extra_info["moments"] = moments
    benchmark.extra_info["row"] = {
        "what": f"Runs on a cache killed by SIGKILL at a random moment and resumed, {KILL_ROWS:,} rows of SST-2",
        "ours": f"all {KILLS} end with the unbroken run's scores, to the last bit",
        "peer": "-",
        "how": "tlfast bench epochs",
    }
