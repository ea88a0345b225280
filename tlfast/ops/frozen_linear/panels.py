"""The order in which the CPU kernels read a weight: panels of 32 outputs, one layout for every instruction set."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PANEL = 32  # outputs
_TILE = 16  # outputs of a tile; a panel is two
_GROUPS = 16  # groups of neighbouring inputs in a tile


def padded(outputs: int) -> int:
    """Outputs in whole panels."""
    return -(-outputs // PANEL) * PANEL


def to_panels(rows: torch.Tensor, group: int, fill: int = 0) -> torch.Tensor:
    """(outputs, inputs) to (panels, steps, 2, 16, 16, group): `group` neighbouring inputs of 16 outputs side by side.

    A step is 16 groups. What is missing to whole panels and steps is `fill`.
    """
    outputs, inputs = rows.shape
    rows = F.pad(rows, (0, -inputs % (_GROUPS * group), 0, -outputs % PANEL), value=fill)
    tiles = rows.reshape(-1, 2, _TILE, rows.shape[1] // (_GROUPS * group), _GROUPS, group)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def panels_shape(outputs: int, inputs: int, group: int) -> tuple[int, ...]:
    """The shape that `to_panels` gives."""
    return padded(outputs) // PANEL, -(-inputs // (_GROUPS * group)), 2, _TILE, _GROUPS, group


def from_panels(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The inverse of `to_panels`, without what was filled in."""
    tiles = panels.permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(tiles.shape[0] * PANEL, -1)[:outputs, :inputs]
