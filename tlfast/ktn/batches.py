"""Fitting KTN on sampled batches of source nodes, for graphs whose states do not fit into memory at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.errors import InputError
from ..graph import Adjacency, EdgeType, HeteroGraph, NeighbourLoader, NeighbourSampler, Sample
from ..graph.loader import Batch
from ..ops import LayerPlan
from .metapaths import Metapath
from .metrics import scores
from .training import KtnFit, KtnModel, KtnSettings, KtnTraining, run_to_end


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

    matched: edges a node draws along the metapaths. neighbours: edges it draws for its state.

    A node may be met again further along a path, and what it draws it draws once: so a hop draws from every relation
    that stands on a path there or later.
    """

    def __init__(
        self,
        adjacency: Adjacency,
        source: str,
        target: str,
        paths: list[Metapath],
        layers: int,
        matched: int,
        neighbours: int,
    ) -> None:
        self.source, self.target = source, target
        hops = []
        for place in range(max(len(path) for path in paths)):
            wanted = {edge_type for path in paths for edge_type in path[place:]}
            hops.append({edge_type: matched if edge_type in wanted else 0 for edge_type in adjacency.edge_types})
        self._paths = NeighbourSampler(adjacency, hops)
        self._states = NeighbourSampler(adjacency, [neighbours] * layers)

    def sample(self, seeds: Mapping[str, torch.Tensor], seed: int = 0) -> TransferSample:
        """Of seeds {source type: nodes}."""
        paths = self._paths.sample(seeds, seed)
        count = paths.num_seeds[self.source]
        ends = {self.source: paths.nodes[self.source][:count], self.target: paths.nodes[self.target]}
        return TransferSample(count, paths, self._states.sample(ends, seed ^ 1))


class BatchTraining(KtnTraining):
    """A fit under way on batches. An epoch goes through the training nodes once, in a new order and with new draws.

    Matching is of the labelled nodes of each batch, to `settings.fan_out` neighbours a relation. dev is scored after
    each epoch, always on the same draws, with matching to `settings.neighbours` neighbours.

    Raises what `KtnTraining` raises.
    """

    def __init__(self, graph: HeteroGraph, adjacency: Adjacency, settings: KtnSettings) -> None:
        super().__init__(graph, adjacency, settings)
        if settings.batch_size < 1:
            raise InputError(f"batch_size must be at least 1 to train on batches, not {settings.batch_size}")
        self._batches = training_batches(graph, adjacency, settings, self._model, self._train)
        sampler = _sampler(adjacency, settings, self._model, settings.neighbours)
        seeds = {settings.source: self._dev}
        self._dev_batches = NeighbourLoader(graph, sampler, seeds, settings.batch_size, False, settings.seed)

    def run_epoch(self) -> dict[str, float]:
        """A step for each batch; returns the epoch's entry of the history: means over its nodes, dev after it.

        Raises InputError where the loss is not finite.
        """
        start, epoch = time.perf_counter(), len(self._history) + 1
        self._batches.epoch, self._dev_batches.epoch = epoch, 0
        entry = {"epoch": epoch, **self._steps(), **self._score(), "seconds": time.perf_counter() - start}
        self._take(entry)
        return entry

    def _steps(self) -> dict[str, float]:
        sums, nodes = torch.zeros(2, dtype=torch.float64), 0
        for batch in self._batches:
            self._optimizer.zero_grad()
            classification, matching, _, truth = batch_losses(self._model, batch, self._labels)
            loss = classification + self._settings.matching * matching
            if not bool(torch.isfinite(loss)):
                raise InputError(f"the loss is {loss.item()}; lower the learning rate, or scale the features down")
            loss.backward()
            self._optimizer.step()
            sums += len(truth) * torch.stack([loss.detach(), matching.detach()])
            nodes += len(truth)
        mean_loss, mean_matching = (sums / nodes).tolist()
        return {"loss": mean_loss, "matching": mean_matching}

    @torch.no_grad()
    def _score(self) -> dict[str, float]:
        total, predictions, truths = 0.0, [], []
        for batch in self._dev_batches:
            classification, matching, predicted, truth = batch_losses(self._model, batch, self._labels)
            total += len(truth) * float(classification + self._settings.matching * matching)
            predictions.append(predicted)
            truths.append(truth)
        predicted, truth = torch.cat(predictions), torch.cat(truths)
        return {"dev_loss": total / len(truth), "dev_accuracy": scores(predicted, truth)["accuracy"]}


def training_batches(
    graph: HeteroGraph, adjacency: Adjacency, settings: KtnSettings, model: KtnModel, train: torch.Tensor
) -> NeighbourLoader:
    """Batches of the training nodes, each epoch in a new order."""
    sampler = _sampler(adjacency, settings, model, settings.fan_out)
    return NeighbourLoader(graph, sampler, {settings.source: train}, settings.batch_size, True, settings.seed)


def _sampler(adjacency: Adjacency, settings: KtnSettings, model: KtnModel, matched: int) -> TransferSampler:
    ends = settings.source, settings.target
    return TransferSampler(adjacency, *ends, model.transfer.paths, settings.layers, matched, settings.neighbours)


def batch_losses(
    model: KtnModel, batch: Batch, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classification and matching of a batch of `TransferSampler`; its seeds' log-probabilities and labels."""
    sample = batch.sample
    assert isinstance(sample, TransferSample)
    h = model.gnn(batch.x, sample)
    source = model.transfer.source
    predicted, truth = model.classifier(h[source]), labels[sample.nodes[source][: sample.seeds]]
    matching = model.transfer.matching_loss(h, sample.paths.adjacency, sample.seeds)
    return model.classifier.loss(predicted, truth), matching, predicted, truth


def fit_batches(
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    progress: Callable[[dict[str, float]], None] = lambda entry: None,
    keep: Callable[[KtnTraining], None] = lambda training: None,
    resumed: dict[str, Any] | None = None,
) -> KtnFit:
    """As `training.fit`, with a step for each batch of labelled source nodes and their sampled neighbours."""
    return run_to_end(BatchTraining(graph, adjacency, settings), progress, keep, resumed)
