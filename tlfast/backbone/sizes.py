"""What a frozen model's weights take at each precision, from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.frozen_linear import stored_layout
from ..ops.frozen_linear.panels import PANEL, padded
from .parts import Part
from .prepare import Gated, groups_of, has_head, sensitive_layers, small_table
from .stack import Stack


def weight_bytes(model: Any, stacks: dict[str, Stack], precision: str) -> int:
    """What `freeze(model, precision).weight_bytes()` gives, but for the few numbers by which int8 smooths its inputs.

    model: its tensors may be on the meta device or fake ones. Counts what the model holds, a head that it has included.
    """
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if precision == "fp32":
        return whole
    for stack in stacks.values():
        for block in stack.blocks:
            whole += _stored_block(stack, block, precision) - sum(map(_own, _linears(stack, block)))
    if not has_head(model):
        inside = {id(module) for stack in stacks.values() for module in stack.blocks.modules()}
        tables = {id(m.weight): m.weight for m in model.modules() if type(m) is nn.Embedding and id(m) not in inside}
        for table in tables.values():
            if not small_table(table):
                whole += _stored_table(table, precision) - table.nbytes
    return whole


def _linears(stack: Stack, block: nn.Module) -> list[nn.Module]:
    return [module for group in groups_of(block, stack.parts) for module in group]


def _own(linear: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in linear.parameters())


def _stored_block(stack: Stack, block: nn.Module, precision: str) -> int:
    sensitive, gated, total = sensitive_layers(block, stack.parts, precision), Gated.of(stack, block), 0
    for group in groups_of(block, stack.parts):
        parts = [Part(module) for module in group]
        chosen = "int8_weight_only" if id(group[0]) in sensitive else precision
        turn = PANEL // 2 if gated is not None and group == gated.halves else PANEL
        rows = sum(-(-len(part.weight) // turn) * turn for part in parts)
        left_out = {"smooth"} if any(part.bias is not None for part in parts) else {"smooth", "bias"}
        layout = stored_layout(chosen, padded(rows), parts[0].weight.shape[1])
        total += sum(_bytes(*entry) for name, entry in layout.items() if name not in left_out)
    return total


def _stored_table(table: torch.Tensor, precision: str) -> int:
    return 2 * table.numel() if precision == "bf16" else table.numel() + 4 * len(table)


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
