"""Fitting KTN on sampled batches of source nodes, for graphs whose states do not fit into memory at once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..data.errors import InputError
from ..graph import Adjacency, EdgeType, HeteroGraph, NeighbourLoader, NeighbourSampler, Sample
from ..graph.loader import Batch
from ..ops import LayerPlan
from .metapaths import Metapath
from .metrics import scores
from .training import KtnFit, KtnModel, KtnSettings, source_labels, split, target_labels


@dataclass(frozen=True)
class BatchSettings:
    """Source nodes a batch, and edges a node draws from each relation in each hop.

    Raises InputError for numbers below 1.
    """

    size: int
    fan_out: int = 10

    def __post_init__(self) -> None:
        for name, value in (("batch size", self.size), ("fan-out", self.fan_out)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class TransferSample:
    """What one batch needs: metapaths from the seeds to target nodes, and the neighbours all their states depend on.

    seeds: how many source nodes are seeds; they come first. paths: the sampled metapaths' edges. states: what to run
    the layers on; they give states to the seeds and to the target nodes of `paths`, in its order.
    """

    seeds: int
    paths: Sample
    states: Sample

    @property
    def nodes(self) -> dict[str, torch.Tensor]:
        """{type: the graph's numbers of the nodes whose features are read}."""
        return self.states.nodes

    def plans(self, node_types: tuple[str, ...], edge_types: tuple[EdgeType, ...], layers: int) -> list[LayerPlan]:
        """As `Sample.plans`, of the states."""
        return self.states.plans(node_types, edge_types, layers)


class TransferSampler:
    """Draws the metapaths of source nodes, and then the neighbours of both ends.

    A node may be met again further along a path, and what it draws it draws once: so a hop draws from every relation
    that stands on a path there or later.
    """

    def __init__(
        self, adjacency: Adjacency, source: str, target: str, paths: list[Metapath], layers: int, fan_out: int
    ) -> None:
        self.source, self.target = source, target
        hops = []
        for place in range(max(len(path) for path in paths)):
            wanted = {edge_type for path in paths for edge_type in path[place:]}
            hops.append({edge_type: fan_out if edge_type in wanted else 0 for edge_type in adjacency.edge_types})
        self._paths = NeighbourSampler(adjacency, hops)
        self._states = NeighbourSampler(adjacency, [fan_out] * layers)

    def sample(self, seeds: Mapping[str, torch.Tensor], seed: int = 0) -> TransferSample:
        """Of seeds {source type: nodes}."""
        paths = self._paths.sample(seeds, seed)
        count = paths.num_seeds[self.source]
        ends = {self.source: paths.nodes[self.source][:count], self.target: paths.nodes[self.target]}
        return TransferSample(count, paths, self._states.sample(ends, seed ^ 1))


def fit_batches(
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    batches: BatchSettings,
    progress: Callable[[dict[str, float]], None] = lambda entry: None,
) -> KtnFit:
    """As `training.fit`, with a step for each batch of labelled source nodes and their sampled neighbours.

    An epoch goes through the training nodes once, in a new order and with new draws; matching is of these nodes. dev is
    scored after each epoch, always on the same draws.
    Raises what `training.fit` raises.
    """
    labels = source_labels(graph, settings.source)
    target_labels(graph, settings.target, labels.shape[1])  # what cannot be scored is said before, not after
    train, dev = split(labels, settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = KtnModel(graph, settings, labels.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    paths = model.transfer.paths
    sampler = TransferSampler(adjacency, settings.source, settings.target, paths, settings.layers, batches.fan_out)
    loader = NeighbourLoader(graph, sampler, {settings.source: train}, batches.size, seed=settings.seed)
    history: list[dict[str, float]] = []
    best, best_epoch, best_state = float("inf"), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        entry = _train(model, optimizer, loader, labels, settings.matching)
        fixed = NeighbourLoader(graph, sampler, {settings.source: dev}, batches.size, False, settings.seed)
        entry |= _score(model, fixed, labels, settings.matching)
        history.append({"epoch": epoch, **entry, "seconds": time.perf_counter() - start})
        if entry["dev_loss"] < best:
            best, best_epoch, best_state = entry["dev_loss"], epoch, copy.deepcopy(model.state_dict())
        progress(history[-1])
        if epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    return KtnFit(model, train, dev, history, best_epoch)


def _losses(
    model: KtnModel, batch: Batch, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classification and matching of a batch; the seeds' log-probabilities and label distribution."""
    sample = batch.sample
    assert isinstance(sample, TransferSample)
    h = model.gnn(batch.x, sample)
    source = model.transfer.source
    predicted, truth = model.classifier(h[source]), labels[sample.nodes[source][: sample.seeds]]
    matching = model.transfer.matching_loss(h, sample.paths.adjacency, sample.seeds)
    return model.classifier.loss(predicted, truth), matching, predicted, truth


def _train(
    model: KtnModel, optimizer: torch.optim.Optimizer, loader: NeighbourLoader, labels: torch.Tensor, weight: float
) -> dict[str, float]:
    """One epoch; means over its nodes."""
    sums, nodes = torch.zeros(2, dtype=torch.float64), 0
    for batch in loader:
        optimizer.zero_grad()
        classification, matching, _, truth = _losses(model, batch, labels)
        loss = classification + weight * matching
        if not bool(torch.isfinite(loss)):
            raise InputError(f"the loss is {loss.item()}; lower the learning rate, or scale the features down")
        loss.backward()
        optimizer.step()
        sums += len(truth) * torch.stack([loss.detach(), matching.detach()])
        nodes += len(truth)
    loss_sum, matching_sum = (sums / nodes).tolist()
    return {"loss": loss_sum, "matching": matching_sum}


@torch.no_grad()
def _score(model: KtnModel, loader: NeighbourLoader, labels: torch.Tensor, weight: float) -> dict[str, float]:
    total, predictions, truths = 0.0, [], []
    for batch in loader:
        classification, matching, predicted, truth = _losses(model, batch, labels)
        total += len(truth) * float(classification + weight * matching)
        predictions.append(predicted)
        truths.append(truth)
    predicted, truth = torch.cat(predictions), torch.cat(truths)
    return {"dev_loss": total / len(truth), "dev_accuracy": scores(predicted, truth)["accuracy"]}
