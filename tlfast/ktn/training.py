"""Fitting KTN on the whole graph: classification on the source type and matching, with the best epoch restored."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.errors import InputError
from ..graph import Adjacency, HeteroGraph
from ..graph.hetero import there_are
from .classifier import Classifier, label_distribution
from .hmpnn import HMPNN
from .metrics import scores
from .thinning import Thinning
from .transfer import KnowledgeTransfer

DEV_FRACTION = 0.1
_DRAWS = 1_000_003  # apart for each seed and epoch, so that a resumed fit draws what an unbroken one does


@dataclass(frozen=True)
class KtnSettings:
    """What a fit is asked for: types, sizes, and Adam's learning rate; matching weighs the matching loss.

    fan_out: a step matches source states to at most so many neighbours of a node in each relation, drawn anew (see
    `Thinning`); 1 as in the authors' code. The mean over all of a large neighbourhood is the same at every step: it
    fits where the mean lies, and not the single nodes that are to be classified.
    batch_size: labelled source nodes a step, for `batches.fit_batches`; 0: the whole graph. neighbours: with it, edges
    that a node draws from each relation in each hop.

    patience: epochs without a better dev loss before it stops. With a handful of dev nodes that loss may rise for
    twenty epochs before it falls to its least.

    Raises InputError for numbers out of range.
    """

    source: str
    target: str
    hops: int = 1
    epochs: int = 60
    hidden: int = 64
    layers: int = 2
    lr: float = 2e-3
    matching: float = 1.0
    fan_out: int = 1
    patience: int = 60
    seed: int = 0
    batch_size: int = 0
    neighbours: int = 10

    def __post_init__(self) -> None:
        for name in ("hops", "epochs", "hidden", "layers", "patience", "fan_out", "neighbours"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size < 0:
            raise InputError(f"batch_size must be at least 1, or 0 for the whole graph, not {self.batch_size}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr must be positive and finite, not {self.lr}")
        if not 0 <= self.matching < float("inf"):
            raise InputError(f"matching must be 0 or more, not {self.matching}")


class KtnModel(nn.Module):
    """HMPNN, the source's classifier and the transfer, as `fit` trains and `predict` reads them."""

    def __init__(self, graph: HeteroGraph, settings: KtnSettings, num_classes: int) -> None:
        super().__init__()
        self.gnn = HMPNN(graph, settings.hidden, settings.hidden, settings.layers)
        self.transfer = KnowledgeTransfer(graph, settings.source, settings.target, settings.hops, settings.hidden)
        self.classifier = Classifier(settings.hidden, num_classes)

    @torch.no_grad()
    def predict(self, graph: HeteroGraph, adjacency: Adjacency) -> dict[str, torch.Tensor]:
        """Log-probabilities: "source", "raw" (target states as they are) and "ktn" (transferred), (nodes, classes)."""
        h = self.gnn(graph.x, adjacency)
        source, target = h[self.transfer.source], h[self.transfer.target]
        return {
            "source": self.classifier(source),
            "raw": self.classifier(target),
            "ktn": self.classifier(target, self.transfer.matrix()),
        }


@dataclass
class KtnFit:
    """A fitted model, the source nodes that trained and selected it, and each epoch's loss and dev scores."""

    model: KtnModel
    train: torch.Tensor
    dev: torch.Tensor
    history: list[dict[str, float]]
    best_epoch: int

    @property
    def seconds_per_epoch(self) -> float:
        """Median of the epochs."""
        return sorted(entry["seconds"] for entry in self.history)[len(self.history) // 2]


def source_labels(graph: HeteroGraph, source: str) -> torch.Tensor:
    """Label distribution of the source type, (nodes, classes).

    Raises InputError where the source has no labels, or too few to train and select by.
    """
    if source not in graph.y:
        labelled = there_are(graph.y).replace("there are", "labels are on")
        raise InputError(f"source {source!r}: has no labels to learn from; {labelled}")
    labels = label_distribution(graph.y[source], graph.num_classes)
    count = int((labels.sum(1) > 0).sum())
    if count < 2:
        raise InputError(f"source {source!r}: {count} nodes have a label; training and selection need at least 2")
    return labels


def target_labels(graph: HeteroGraph, target: str, classes: int) -> torch.Tensor | None:
    """Label distribution of the target type, (nodes, classes), for scores alone; None where no node has a label.

    Raises InputError for labels of other classes than the source's.
    """
    if target not in graph.y or not graph.y[target].numel():
        return None
    labels = label_distribution(graph.y[target], classes)
    if labels.shape[1] != classes:
        raise InputError(f"target {target!r}: y has {labels.shape[1]} classes, and the source {classes}")
    return labels if bool((labels.sum(1) > 0).any()) else None


def split(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of labelled nodes for training and dev: a seeded tenth, of each class one where it has more than two."""
    draw = torch.Generator().manual_seed(seed)
    main = labels.argmax(1)
    dev = []
    for label in range(labels.shape[1]):
        nodes = ((main == label) & (labels.sum(1) > 0)).nonzero().flatten()
        count = max(round(DEV_FRACTION * nodes.numel()), 1 if nodes.numel() > 2 else 0)
        dev.append(nodes[torch.randperm(nodes.numel(), generator=draw)[:count]])
    chosen = torch.cat(dev).sort().values
    labelled = labels.sum(1) > 0
    if not chosen.numel():
        chosen = labelled.nonzero().flatten()[:1]
    labelled[chosen] = False
    return labelled.nonzero().flatten(), chosen


class KtnTraining:
    """A fit under way. Each epoch is a step on the whole graph and a forward that scores the weights it led to.

    Raises InputError for a graph that has no labels on the source or no metapath, or whose target has other classes.
    """

    def __init__(self, graph: HeteroGraph, adjacency: Adjacency, settings: KtnSettings) -> None:
        self._graph, self._adjacency, self._settings = graph, adjacency, settings
        self._labels = source_labels(graph, settings.source)
        target_labels(graph, settings.target, self._labels.shape[1])  # what cannot be scored is said before, not after
        self._train, self._dev = split(self._labels, settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._model = KtnModel(graph, settings, self._labels.shape[1])
        relations = [edge_type for path in self._model.transfer.paths for edge_type in path]
        self._thinning = Thinning(adjacency, relations, settings.fan_out)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=settings.lr)
        self._history: list[dict[str, float]] = []
        self._best_epoch, self._best_state = 0, self._weights()
        self._ahead: _Losses | None = None  # of the weights as they are, for the next step

    @property
    def done(self) -> bool:
        """Whether all epochs have run, or `patience` of them without a better one."""
        epochs = len(self._history)
        return epochs >= self._settings.epochs or epochs - self._best_epoch >= self._settings.patience

    def run_epoch(self) -> dict[str, float]:
        """One step; returns its entry of the history, whose figures are those of the weights after it.

        Raises InputError where the loss is not finite.
        """
        start = time.perf_counter()
        before = self._forward(len(self._history)) if self._ahead is None else self._ahead
        self._ahead = None
        self._optimizer.zero_grad()
        before.total.backward()
        self._optimizer.step()
        epoch = len(self._history) + 1
        after = self._ahead = self._forward(epoch)
        entry = {"epoch": epoch, **after.figures, "seconds": time.perf_counter() - start}
        self._take(entry)
        return entry

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on after the last epoch: tensors, numbers and their containers."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "history": self._history,
            "best_epoch": self._best_epoch,
            "best": self._best_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a training with the same graph and settings."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._history, self._best_epoch, self._best_state = state["history"], state["best_epoch"], state["best"]
        self._ahead = None

    def result(self) -> KtnFit:
        """The model with the weights of the best epoch; InputError where none has a finite dev loss."""
        if self._history and not self._best_epoch:
            raise InputError("the dev loss is never finite; lower the learning rate, or scale the features down")
        self._model.load_state_dict(self._best_state)
        return KtnFit(self._model, self._train, self._dev, self._history, self._best_epoch)

    def _take(self, entry: dict[str, float]) -> None:
        """An epoch's entry into the history; the weights are the best so far where its dev loss is."""
        least = self._history[self._best_epoch - 1]["dev_loss"] if self._best_epoch else float("inf")
        self._history.append(entry)
        if entry["dev_loss"] < least:
            self._best_epoch, self._best_state = len(self._history), self._weights()

    def _weights(self) -> dict[str, Any]:
        return copy.deepcopy(self._model.state_dict())

    def _forward(self, steps: int) -> _Losses:
        """Of the weights after so many steps; all but them depends on that number alone."""
        model, labels, weight = self._model, self._labels, self._settings.matching
        h = model.gnn(self._graph.x, self._adjacency)
        predicted = model.classifier(h[model.transfer.source])
        classification = model.classifier.loss(predicted[self._train], labels[self._train])
        draw = torch.Generator().manual_seed(_DRAWS * self._settings.seed + steps)
        matching = model.transfer.matching_loss(h, self._thinning.draw(draw))
        total = classification + weight * matching
        if not bool(torch.isfinite(total)):
            raise InputError(f"the loss is {float(total)}; lower the learning rate, or scale the features down")
        with torch.no_grad():
            of_dev = float(model.classifier.loss(predicted[self._dev], labels[self._dev]))
            accuracy = scores(predicted[self._dev], labels[self._dev])["accuracy"]
            of_all = float(model.transfer.matching_loss(h, self._adjacency))
        figures = {
            "loss": total.item(),
            "matching": of_all,
            "dev_loss": of_dev + weight * of_all,
            "dev_accuracy": accuracy,
        }
        return _Losses(total, figures)


@dataclass
class _Losses:
    """Of one forward: what is to be minimised, with its graph, and figures for the history."""

    total: torch.Tensor
    figures: dict[str, float]


def fit(
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    progress: Callable[[dict[str, float]], None] = lambda entry: None,
    keep: Callable[[KtnTraining], None] = lambda training: None,
    resumed: dict[str, Any] | None = None,
) -> KtnFit:
    """Train on the whole graph; the epoch with the least dev loss (classification and matching) is restored.

    A step matches to a few neighbours, the dev loss to all.

    progress: called after each epoch with its entry of the history. keep: called before that, to keep the state_dict.
    resumed: such a state; what follows it is what an unbroken run does. Stops after `patience` epochs without a better
    one. Raises what `KtnTraining` raises.
    """
    return run_to_end(KtnTraining(graph, adjacency, settings), progress, keep, resumed)


def run_to_end(
    training: KtnTraining,
    progress: Callable[[dict[str, float]], None],
    keep: Callable[[KtnTraining], None],
    resumed: dict[str, Any] | None,
) -> KtnFit:
    """All epochs of a training, from the state `resumed` on where it is given, as `fit` says."""
    if resumed is not None:
        training.load_state_dict(resumed)
    while not training.done:
        entry = training.run_epoch()
        keep(training)
        progress(entry)
    return training.result()


def evaluate(fitted: KtnFit, graph: HeteroGraph, adjacency: Adjacency) -> dict[str, Any]:
    """Scores of the source on dev, and of the target without and with transfer where the target has labels."""
    return score_all(fitted, graph, fitted.model.predict(graph, adjacency))


def score_all(fitted: KtnFit, graph: HeteroGraph, predicted: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As `evaluate`, of what the model predicts."""
    source, target = fitted.model.transfer.source, fitted.model.transfer.target
    labels = source_labels(graph, source)
    result: dict[str, Any] = {"source": scores(predicted["source"][fitted.dev], labels[fitted.dev])}
    truth = target_labels(graph, target, labels.shape[1])
    if truth is not None:
        result["target"] = {name: scores(predicted[name], truth) for name in ("raw", "ktn")}
    return result
