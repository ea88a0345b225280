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
from .transfer import KnowledgeTransfer

DEV_FRACTION = 0.1


@dataclass(frozen=True)
class KtnSettings:
    """What a fit is asked for: types, sizes, and Adam's learning rate; matching weighs the matching loss.

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
    patience: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hops", "epochs", "hidden", "layers", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
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


def fit(
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    progress: Callable[[dict[str, float]], None] = lambda entry: None,
) -> KtnFit:
    """Train on the whole graph; the epoch with the least dev loss (classification and matching) is restored.

    progress: called after each epoch with its entry of the history. Stops after `patience` epochs without a better one.
    Raises InputError for a graph that has no labels on the source or no metapath, and where the loss is not finite.
    """
    labels = source_labels(graph, settings.source)
    target_labels(graph, settings.target, labels.shape[1])  # what cannot be scored is said before, not after
    train, dev = split(labels, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = KtnModel(graph, settings, labels.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    history: list[dict[str, float]] = []
    best, best_epoch, best_state = float("inf"), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        before = copy.deepcopy(model.state_dict())  # dev is scored on the same forward as the step starts from
        entry = _step(model, optimizer, graph, adjacency, labels, train, dev, settings.matching)
        history.append({"epoch": epoch, **entry, "seconds": time.perf_counter() - start})
        if entry["dev_loss"] < best:
            best, best_epoch, best_state = entry["dev_loss"], epoch, before
        progress(history[-1])
        if epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    return KtnFit(model, train, dev, history, best_epoch)


def _step(
    model: KtnModel,
    optimizer: torch.optim.Optimizer,
    graph: HeteroGraph,
    adjacency: Adjacency,
    labels: torch.Tensor,
    train: torch.Tensor,
    dev: torch.Tensor,
    weight: float,
) -> dict[str, float]:
    """One step on all training nodes; the figures are those of the weights before it."""
    optimizer.zero_grad()
    h = model.gnn(graph.x, adjacency)
    predicted = model.classifier(h[model.transfer.source])
    classification = model.classifier.loss(predicted[train], labels[train])
    matching = model.transfer.matching_loss(h, adjacency)
    loss = classification + weight * matching
    if not bool(torch.isfinite(loss)):
        raise InputError(f"the loss is {float(loss)}; lower the learning rate, or scale the features down")
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        of_dev = float(model.classifier.loss(predicted[dev], labels[dev])) + weight * float(matching)
        found = scores(predicted[dev], labels[dev])
    return {"loss": loss.item(), "matching": matching.item(), "dev_loss": of_dev, "dev_accuracy": found["accuracy"]}


def evaluate(fitted: KtnFit, graph: HeteroGraph, adjacency: Adjacency) -> dict[str, Any]:
    """Scores of the source on dev, and of the target without and with transfer where the target has labels."""
    predicted = fitted.model.predict(graph, adjacency)
    source, target = fitted.model.transfer.source, fitted.model.transfer.target
    labels = source_labels(graph, source)
    result: dict[str, Any] = {"source": scores(predicted["source"][fitted.dev], labels[fitted.dev])}
    truth = target_labels(graph, target, labels.shape[1])
    if truth is not None:
        result["target"] = {name: scores(predicted[name], truth) for name in ("raw", "ktn")}
    return result
