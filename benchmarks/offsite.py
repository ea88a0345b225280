"""Both sides of offsite-tuning, for its benchmarks: a bundle, what was tuned on it, and what that is worth plugged in.

What is trained runs in bfloat16 by autocast, without dropout: twice as fast on a CPU with AMX.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlfast import offsite, training
from tlfast.data import Examples, PadBatch, TokenDataset
from tlfast.offsite import comparison, tuning
from tlfast.offsite.comparison import Comparison

METHOD = offsite.Method("full")


@dataclass(frozen=True)
class Data:
    """A task with its data, as both parties read them."""

    task: Any
    data: training.TaskData
    test: Any
    tokenizer: Any

    @property
    def spec(self) -> offsite.TaskSpec:
        """What an adapter says of the task."""
        return tuning.spec_of(self.task, self.tokenizer)


def half() -> AbstractContextManager[Any]:
    """Autocast to bfloat16. Casts are not kept: an optimizer's step would not reach them."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def read(files: dict[str, Path | None], tokenizer: Any, max_length: int, seed: int) -> Data:
    """Tokenised training, dev and test data of a file of texts with classes."""
    train_file, test_file = files["train"], files["test"]
    assert train_file is not None and test_file is not None
    task = training.TextTask(max_length, "minilm")
    task, data = training.load_data(task, train_file, files["dev"], tokenizer, seed)
    return Data(task, data, task.dataset(task.read(test_file, labelled=True), tokenizer), tokenizer)


def texts_as_batches(texts: Sequence[str], tokenizer: Any, max_length: int, seed: int) -> Any:
    """Batches of unlabelled texts, as `tlfast offsite make --distill` makes them."""
    from tlfast.cli.offsite_model import Batches

    lines = list(range(1, len(texts) + 1))
    examples = Examples(Path("texts"), list(texts), None, None, lines)
    dataset = TokenDataset.tokenise(examples, tokenizer, max_length)
    return Batches(dataset, PadBatch.of(tokenizer, max_length), seed)


def bundle(
    full: nn.Module, adapter: tuple[int, int], recipe: str, distillation: offsite.Distillation | None = None
) -> offsite.Bundle:
    """What the data owner gets; its folder is read, and gone."""
    with tempfile.TemporaryDirectory() as folder, half():
        return offsite.make(full, adapter, recipe, Path(folder) / "bundle", None, distillation)


def tune(sent: offsite.Bundle, data: Data, settings: training.Settings) -> nn.Module:
    """The data owner's work: the adapter's blocks and the head, the epoch chosen by the emulator's score on dev."""
    with tempfile.TemporaryDirectory() as folder, half():
        fit = tuning.tune(sent, data.task, data.data, data.spec, METHOD, settings, Path(folder))
    return fit.model.eval()


@contextmanager
def adapter_of(sent: offsite.Bundle, tuned: nn.Module, data: Data) -> Iterator[Path]:
    """A folder with the adapter, as it is sent back."""
    with tempfile.TemporaryDirectory() as folder:
        offsite.save_adapter(Path(folder), tuned, sent, data.spec, METHOD)
        yield Path(folder)


def tune_full(
    full: nn.Module, sent: offsite.Bundle, tuned: nn.Module, data: Data, settings: training.Settings
) -> nn.Module:
    """The same blocks and the head, tuned inside the full model."""
    with adapter_of(sent, tuned, data) as folder, half():
        return tuning.tune_full(full, sent, offsite.Adapter.open(folder), data.task, data.data, settings)


def stages(
    full: nn.Module,
    sent: offsite.Bundle,
    tuned: nn.Module,
    data: Data,
    alignment: offsite.Distillation | None = None,
) -> dict[str, nn.Module]:
    """Zero-shot, tuned emulator and plug-in, from the adapter as it is sent back."""
    with adapter_of(sent, tuned, data) as folder, half():
        return tuning.stages(full, sent, offsite.Adapter.open(folder), alignment=alignment)


def compare(models: dict[str, nn.Module], data: Data) -> Comparison:
    """Scores on the test set with intervals."""
    with half():
        return comparison.compare(models, data.test, data.data.collate, data.data.scoring)
