"""Training the same backbone with domain adaptation in place of transfer: the baselines that learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..data.errors import InputError
from ..graph import Adjacency, HeteroGraph
from .adaptation import ADAPTATIONS, Side, make_adaptation
from .classifier import Classifier
from .hmpnn import HMPNN
from .training import KtnSettings, source_labels, split


class AdaptedModel(nn.Module):
    """HMPNN and a classifier that both types share, and what makes their states alike."""

    def __init__(self, name: str, graph: HeteroGraph, settings: KtnSettings, num_classes: int) -> None:
        super().__init__()
        self.gnn = HMPNN(graph, settings.hidden, settings.hidden, settings.layers)
        self.classifier = Classifier(settings.hidden, num_classes)
        self.adaptation = make_adaptation(name, settings.hidden, num_classes)


def fit_adapted(
    name: str,
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    progress: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Log-probabilities of the target's nodes (nodes, classes) by the epoch that is best on the source's dev nodes.

    name: one of `ADAPTATIONS`. Split, sizes, learning rate, epochs and patience are those of `fit`; the adaptation loss
    has weight 1. progress: called after each epoch.
    Raises InputError where the loss is not finite, or the dev loss never is.
    """
    labels = source_labels(graph, settings.source)
    train, dev = split(labels, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AdaptedModel(name, graph, settings, labels.shape[1])
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    best, best_epoch, predicted = float("inf"), 0, torch.empty(0)
    for epoch in range(settings.epochs + 1):
        h = model.gnn(graph.x, adjacency)
        source, target = (Side(h[t], model.classifier(h[t])) for t in (settings.source, settings.target))
        of_dev = float(model.classifier.loss(source.log_probabilities[dev], labels[dev]).detach())
        if epoch and of_dev < best:
            best, best_epoch, predicted = of_dev, epoch, target.log_probabilities.detach()
        if epoch == settings.epochs or epoch - best_epoch >= settings.patience:
            break
        loss = model.classifier.loss(source.log_probabilities[train], labels[train])
        loss = loss + model.adaptation(source.some(draw), target.some(draw), epoch / settings.epochs)
        if not bool(torch.isfinite(loss)):
            raise InputError(f"the loss of the baseline {name} is {loss.item()}; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress()
    if not best_epoch:
        raise InputError(f"the dev loss of the baseline {name} is never finite; lower the learning rate")
    return predicted


def baseline_names(text: str) -> list[str]:
    """The names in "dan, coral", or all for "all"; InputError for others."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names == ["all"]:
        return list(ADAPTATIONS)
    for name in names:
        if name not in ADAPTATIONS:
            raise InputError(f"baselines: {name!r} is none; name some of {', '.join(ADAPTATIONS)}, or all")
    return list(dict.fromkeys(names))
