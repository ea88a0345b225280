"""Mini-batches of a graph, prepared ahead of their use in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..data.errors import InputError
from ..ops import LayerPlan
from .hetero import EdgeType, HeteroGraph, as_graph


class Sampled(Protocol):
    """What a loader's sampler gives: a `Sample`, or what has as much."""

    @property
    def nodes(self) -> Mapping[str, torch.Tensor]:
        """{type: the graph's numbers of its nodes}."""

    def plans(self, node_types: tuple[str, ...], edge_types: tuple[EdgeType, ...], layers: int) -> list[LayerPlan]:
        """How each of so many layers runs."""


class Sampler(Protocol):
    """What draws a loader's batches: a `NeighbourSampler`, or what samples alike."""

    def sample(self, seeds: Mapping[str, torch.Tensor], seed: int = 0) -> Sampled:
        """What seeds draw; the same for the same seed."""


@dataclass
class Batch:
    """A `Sample` with the features of its nodes, as a model takes them: gnn(batch.x, batch.sample)."""

    sample: Any
    x: dict[str, torch.Tensor]


def features_of(graph: HeteroGraph, sample: Sampled) -> dict[str, torch.Tensor]:
    """{type: features of the sampled nodes, in their order}, for every type that has features."""
    return {t: x.index_select(0, sample.nodes[t]) for t, x in graph.x.items()}


class NeighbourLoader:
    """Iterates over batches of seeds with their sampled neighbours, each epoch in a new order.

    Args:
        graph: HeteroData or `HeteroGraph` whose features are gathered.
        sampler: draws the neighbours.
        seeds: {type: (n,) integers}, the nodes to go through. Shuffled, a batch takes of each type in proportion, on
            average; else one type comes after the other.
        batch_size: seeds a batch, of all types together.
        shuffle: a new order each epoch; else as given.
        seed: of orders and draws. Iterating the e-th time gives the same batches for the same seed.
        prefetch: batches prepared ahead, in one thread; 0: none, prepared when asked for.

    Each iteration gives `Batch`es and counts as an epoch. An error in the thread is raised where the batch was due;
    leaving an iteration early ends its thread.

    Raises:
        InputError: batch_size below 1, no seeds, prefetch below 0.
    """

    def __init__(
        self,
        graph: Any,
        sampler: Sampler,
        seeds: Mapping[str, torch.Tensor],
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        prefetch: int = 2,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("prefetch", prefetch, 0)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, not {value}")
        self.graph, self.sampler, self.batch_size, self.shuffle = as_graph(graph), sampler, batch_size, shuffle
        self.seeds, self.seed, self.prefetch = dict(seeds), seed, prefetch
        self._types = list(self.seeds)
        self._total = sum(len(nodes) for nodes in self.seeds.values())
        if not self._total:
            raise InputError("seeds are empty: there is nothing to go through")
        self.epoch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self._total // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._ahead(epoch) if self.prefetch else self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(_mixed(self.seed, epoch, 0))
        nodes = torch.cat([self.seeds[t] for t in self._types])
        kinds = torch.repeat_interleave(torch.tensor([len(self.seeds[t]) for t in self._types]))
        order = torch.randperm(self._total, generator=draw) if self.shuffle else torch.arange(self._total)
        for number, chosen in enumerate(order.split(self.batch_size), 1):
            seeds = {t: nodes[chosen[kinds[chosen] == i]] for i, t in enumerate(self._types)}
            sample = self.sampler.sample(seeds, _mixed(self.seed, epoch, number))
            yield Batch(sample, features_of(self.graph, sample))

    def _ahead(self, epoch: int) -> Iterator[Batch]:
        ready: queue.Queue[Any] = queue.Queue(self.prefetch)
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for batch in self._batches(epoch):
                    if not put(batch):
                        return
                put(None)
            except BaseException as error:  # raised again where the batch was due
                put(error)

        thread = threading.Thread(target=work, name="tlfast-neighbours", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def _mixed(*numbers: int) -> int:
    """One number of several, below 2^63."""
    found = 0
    for number in numbers:
        found = (found ^ number) * 0x9E3779B97F4A7C15 % 2**64
        found ^= found >> 29
    return found >> 1
