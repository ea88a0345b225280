"""A small ViT of printed letters, taken to handwritten digits with few labels: ladder, LoRA, linear probe.

The backbone is pre-trained here on letters drawn from fonts; the digits are scikit-learn's. Three draws of the labelled
images, equal steps, each method's setting chosen on dev from one grid; the test images are read once, after that.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import ViTForImageClassification

import tlfast
from benchmarks import pretrain
from benchmarks.loop import Columns, accuracy, shuffled_batches, train, tune
from tlfast.bench.measure import saved_bytes
from tlfast.bench.probe import STRENGTHS

SEEDS = (0, 1, 2)
CLASSES, SHOTS, DEV_SHOTS = 10, 20, 20  # labelled images of each digit; the others are the test
STEPS, BATCH, RATES = 150, 32, (1e-3, 3e-3, 1e-2)
REDUCTION = 4
KIB = 2**10


def _digits(seed: int) -> tuple[Columns, Columns, Columns]:
    """train, dev and test; pixels in [-1, 1], as the letters'."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = [order[labels[order] == digit] for digit in range(CLASSES)]
    cuts = (slice(SHOTS), slice(SHOTS, SHOTS + DEV_SHOTS), slice(SHOTS + DEV_SHOTS, None))
    rows = [torch.cat([indices[cut] for indices in by_class]) for cut in cuts]
    train_data, dev, test = ({"pixel_values": images[chosen], "labels": labels[chosen]} for chosen in rows)
    return train_data, dev, test


def _ladder(vit: nn.Module, train_data: Columns) -> tlfast.LadderModel:
    config = tlfast.LadderConfig(reduction=REDUCTION, init="pca", pooling="cls")
    backbone = tlfast.freeze(vit)
    batch = {"pixel_values": train_data["pixel_values"]}
    return tlfast.LadderModel(
        backbone, task="image-classification", num_labels=CLASSES, config=config, calibration=[batch]
    )


def _lora(vit: Any) -> nn.Module:
    config = copy.deepcopy(vit.config)
    config.num_labels = CLASSES
    model = ViTForImageClassification(config)
    model.base_model.load_state_dict(vit.base_model.state_dict())
    targets = ["query", "value", "q_proj", "v_proj"]  # what older and newer transformers call them
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"]))


def _probe(vit: nn.Module, train_data: Columns, dev: Columns) -> tuple[Callable[[Columns], float], float]:
    """Logistic regression on the class token, which the ViT's own head reads: its accuracy on any data, its seconds."""
    backbone = tlfast.freeze(vit)

    def features(data: Columns) -> Any:
        return backbone(pixel_values=data["pixel_values"]).last_hidden_state[:, 0].numpy()

    start = time.perf_counter()
    fitted = [
        LogisticRegression(C=strength, max_iter=2000).fit(features(train_data), train_data["labels"])
        for strength in STRENGTHS
    ]
    best = max(fitted, key=lambda model: model.score(features(dev), dev["labels"]))
    seconds = time.perf_counter() - start
    return lambda data: best.score(features(data), data["labels"].numpy()), seconds


def _kept(model: nn.Module, data: Columns) -> float:
    """Bytes a sample that a training forward keeps."""
    batch = {name: column[:BATCH] for name, column in data.items()}
    model.train()
    kept = saved_bytes(lambda: model(**batch)) / BATCH
    model.eval()
    return kept


def _one_seed(vit: nn.Module, seed: int) -> dict[str, dict[str, float]]:
    train_data, dev, test = _digits(seed)

    def fit(model: nn.Module, rate: float) -> float:
        return train(model, shuffled_batches(train_data, BATCH, STEPS, seed), STEPS, rate)

    makers = {"ladder": lambda: _ladder(vit, train_data), "LoRA": lambda: _lora(vit)}
    found: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        tuned = tune(make, RATES, fit, lambda model: accuracy(model, dev), seed)
        found[name] = {
            "accuracy": accuracy(tuned.model, test),
            "dev": tuned.score,
            "rate": tuned.rate,
            "seconds": STEPS * tuned.step_seconds,
            "saved_bytes_per_sample": _kept(tuned.model, train_data),
        }
    probe, seconds = _probe(vit, train_data, dev)
    found["linear probe"] = {"accuracy": probe(test), "dev": probe(dev), "seconds": seconds}
    return found


def test_digits(benchmark: Any) -> None:
    vit = pretrain.letter_vit()
    runs = benchmark.pedantic(lambda: [_one_seed(vit, seed) for seed in SEEDS], rounds=1)
    mean = {
        name: {what: statistics.mean(run[name][what] for run in runs) for what in runs[0][name]} for name in runs[0]
    }
    benchmark.extra_info["runs"] = runs
    benchmark.extra_info["mean"] = mean
    figures = {
        name: f"{100 * figure['accuracy']:.1f} % ({figure['seconds']:.1f} s"
        + (f", keeps {figure['saved_bytes_per_sample'] / KIB:.0f} KiB a sample)" if name != "linear probe" else ")")
        for name, figure in mean.items()
    }
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy on digits, ViT of printed letters, {SHOTS} labels a digit, mean of {len(SEEDS)} draws",
        "ours": figures.pop("ladder"),
        "peer": "; ".join(f"{name} {figure}" for name, figure in figures.items()),
        "how": "tlfast bench digits",
    }
