"""Side blocks on a GPU as CUDA graphs: their kernels are short, and launching each takes longer than it runs.

The blocks of a side network have one form, so they share one pair of graphs for each shape of a batch: the forward
pass, and the backward pass that computes it once more. A block's input and weights are copied to where the graphs read
them, which costs a few microseconds, and nothing of a batch stays in a graph.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

# Calls of a shape before it is worth a graph: capturing takes as long as some tens of them.
_CALLS = 64
# Shapes whose graphs are kept, the latest used; each holds the memory that one block's passes need.
_SHAPES = 8
# Shapes whose calls are counted, the latest seen: those that come once and never again must not add up.
_COUNTED = 1024
_WARM_UP = 2

Named = dict[str, torch.Tensor]
Compute = Callable[..., torch.Tensor]  # of a block, the seeds of its dropout or None, and its inputs by name


class BlockGraphs:
    """The graphs of blocks of one side network, made as shapes recur. A copy of it, or a pickle, has none."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[Any, ...], _Pair] = OrderedDict()
        self._calls: OrderedDict[tuple[Any, ...], int] = OrderedDict()
        self._pools: dict[int, Any] = {}  # of a stream, where one graph runs at a time

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockGraphs, ()

    def run(
        self,
        block: nn.Module,
        compute: Compute,
        given: Mapping[str, torch.Tensor | None],
        seeds: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """compute(block, seeds, **given) with its gradient; None where it is not for a graph, or not yet.

        given: by name, with "x" among them; those that require a gradient get one, and so do the weights.
        """
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        if not _can_be_captured(block, inputs["x"]):
            return None
        parameters = list(block.parameters())
        key = _key(block, inputs, parameters)
        pair = self._made.get(key)
        if pair is None:
            if self._count(key) < _CALLS:
                return None
            pair = self._make(key, block, compute, inputs, seeds)
        self._made.move_to_end(key)
        return _Replayed.apply(pair, seeds, *inputs.values(), *parameters)

    def _count(self, key: tuple[Any, ...]) -> int:
        """How often a shape has come, this time included."""
        count = self._calls.pop(key, 0) + 1
        self._calls[key] = count
        if len(self._calls) > _COUNTED:
            self._calls.popitem(last=False)
        return count

    def _make(
        self, key: tuple[Any, ...], block: nn.Module, compute: Compute, inputs: Named, seeds: torch.Tensor | None
    ) -> _Pair:
        while len(self._made) >= _SHAPES:
            self._made.popitem(last=False)
        device = inputs["x"].device
        pool = self._pools.setdefault(_stream(device), _new_pool(device))
        self._made[key] = _Pair(block, compute, inputs, seeds, pool)
        del self._calls[key]
        return self._made[key]


def share_graphs(blocks: Iterable[Any]) -> None:
    """Let blocks have their graphs in common."""
    graphs = BlockGraphs()
    for block in blocks:
        block.graphs = graphs


class _Pair:
    """The two graphs for one form of block and one shape, and where they read and write."""

    def __init__(
        self, block: nn.Module, compute: Compute, inputs: Named, seeds: torch.Tensor | None, pool: Any
    ) -> None:
        device = inputs["x"].device
        self.block = copy.deepcopy(block)
        self.parameters: list[torch.Tensor] = list(self.block.parameters())
        self.inputs = {
            name: torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor.detach())
            for name, tensor in inputs.items()
        }
        self.seeds = None if seeds is None else seeds.to(device, copy=True)
        self.compute, self.autocast = compute, _autocast_without_cache(device.type)
        leaves = [*self.inputs.values(), *self.parameters]
        self.wanted = [tensor.requires_grad for tensor in (*inputs.values(), *self.parameters)]
        for tensor, wanted in zip(leaves, self.wanted, strict=True):
            tensor.requires_grad_(wanted)
        self.leaves = [tensor for tensor, wanted in zip(leaves, self.wanted, strict=True) if wanted]

        with torch.no_grad():
            self.y, self.replay_forward = _captured(self._forward, device, pool)
        self.dy = torch.zeros_like(self.y)
        self.grads, self.replay_backward = _captured(self._backward, device, pool)

    def _forward(self) -> torch.Tensor:
        with self.autocast():
            return self.compute(self.block, self.seeds, **self.inputs)

    def _backward(self) -> list[torch.Tensor | None]:
        with torch.enable_grad():
            y = self._forward()
        return list(torch.autograd.grad(y, self.leaves, self.dy, allow_unused=True))

    def forward(self, seeds: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        self._set(seeds, tensors)
        self.replay_forward()
        return self.y.clone()

    def backward(
        self, seeds: torch.Tensor | None, tensors: Sequence[torch.Tensor], dy: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """The gradient of every tensor, None where none was wanted or none came."""
        self._set(seeds, tensors)
        self.dy.copy_(dy)
        self.replay_backward()
        grads = iter(self.grads)
        found = [next(grads) if wanted else None for wanted in self.wanted]
        return [None if grad is None else grad.clone() for grad in found]

    @torch.no_grad()
    def _set(self, seeds: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        if self.seeds is not None and seeds is not None:
            self.seeds.copy_(seeds, non_blocking=True)
        for place, tensor in zip(self.inputs.values(), tensors, strict=False):
            place.copy_(tensor)
        torch._foreach_copy_(self.parameters, list(tensors[len(self.inputs) :]))


class _Replayed(torch.autograd.Function):
    """Keeps the block's inputs and weights as they were given."""

    @staticmethod
    def forward(ctx: Any, pair: _Pair, seeds: torch.Tensor | None, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.pair, ctx.seeds = pair, seeds
        ctx.save_for_backward(*tensors)
        return pair.forward(seeds, tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.pair.backward(ctx.seeds, ctx.saved_tensors, dy)


def _can_be_captured(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether nothing but tensors of one GPU is at work: no tracer, no capture around it, no hooks, no shards."""
    if x.device.type != "cuda" or not x.numel() or torch.compiler.is_compiling():
        return False
    return _is_plain(block) and not torch.cuda.is_current_stream_capturing()  # pragma: gpu


def _is_plain(block: nn.Module) -> bool:
    if getattr(block, "_is_replica", False):
        return False
    for module in block.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if any(
            parameter is not None and type(parameter) is not nn.Parameter for parameter in module._parameters.values()
        ):
            return False
    return True


def _key(block: Any, inputs: Named, parameters: list[nn.Parameter]) -> tuple[Any, ...]:
    """All that the graphs depend on but numbers; the stream, because they write where others of it read."""
    device = inputs["x"].device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    shapes = tuple((name, x.shape, x.dtype, x.requires_grad) for name, x in inputs.items())
    weights = tuple((weight.shape, weight.dtype, weight.requires_grad) for weight in parameters)
    return device, _stream(device), block.spec, block.training, autocast, shapes, weights


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _autocast_without_cache(kind: str) -> Callable[[], Any]:
    """Autocast as it is now, but for its cache of weights: a weight must be read anew in every replay."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _new_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _captured(
    function: Callable[[], Any], device: torch.device, pool: Any
) -> tuple[Any, Callable[[], None]]:  # pragma: gpu
    """What a function gave when its kernels were captured, and what runs them again, over the same memory."""
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # compiles kernels, and lets libraries allocate what they keep
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # loaders of data may pin memory at the same time, in threads of their own
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
    return result, graph.replay
