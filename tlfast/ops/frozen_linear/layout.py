"""In which order a stored weight lies: in panels as the CPU's kernels read it, or in plain rows as a GPU's do.

Both hold the same numbers, so that a weight can move from one to the other and back without rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .formats import NF4_ZERO
from .panels import PANEL, from_panels, padded, to_panels

PANELS, ROWS = "panels", "rows"
LAYOUTS = (PANELS, ROWS)
# rows of gates, and then as many of what they gate: a panel's two tiles, or neighbours in a GPU program's registers
TURN = {PANELS: PANEL // 2, ROWS: 1}
# neighbouring inputs, for nf4 pairs of them, that lie side by side in a panel
_GROUP = {"bf16": 2, "int8": 4, "int8_weight_only": 4, "fp8": 4, "nf4": 1}
_STEP = 16  # groups of a panel's step: rows are filled up to whole steps
_FILL = {"nf4": NF4_ZERO | NF4_ZERO << 4}


def layout_for(device: torch.device, precision: str) -> str:
    """The layout that kernels on a device read; "fp32" and "fp8" have rows alone."""
    return ROWS if device.type == "cuda" or precision in ("fp32", "fp8") else PANELS


def row_length(precision: str, inputs: int) -> int:
    """What a row of so many inputs takes in whole steps: numbers, for nf4 bytes."""
    step = _STEP * _GROUP[precision]
    return -(-(-(-inputs // 2) if precision == "nf4" else inputs) // step) * step


def lay_out(rows: torch.Tensor, precision: str, layout: str) -> torch.Tensor:
    """Numbers, or bytes of nf4, (N, columns) in a layout: (padded N, whole steps) in rows."""
    fill = _FILL.get(precision, 0)
    if layout == PANELS:
        panels = to_panels(rows, _GROUP[precision], fill)
        return panels[..., 0] if precision == "nf4" else panels
    step = _STEP * _GROUP[precision]
    stored = rows.view(torch.uint8) if precision == "fp8" else rows  # PyTorch does not pad float8
    return F.pad(stored, (0, -rows.shape[1] % step, 0, -len(rows) % PANEL), value=fill).contiguous().view(rows.dtype)


def rows_of(values: torch.Tensor, precision: str) -> torch.Tensor:
    """The inverse of `lay_out`, with what was filled in: (padded N, whole steps) of either layout."""
    if values.dim() == 2:
        return values
    panels = values[..., None] if precision == "nf4" else values
    return from_panels(panels, len(panels) * PANEL, panels.shape[1] * _STEP * panels.shape[-1])


def lay_out_groups(group_scale: torch.Tensor, layout: str) -> torch.Tensor:
    """nf4's scales (N, groups) in a layout: (panels, groups, 32), or (padded N, groups)."""
    rows = F.pad(group_scale, (0, 0, 0, -len(group_scale) % PANEL))
    return (rows.unflatten(0, (-1, PANEL)).transpose(1, 2) if layout == PANELS else rows).contiguous()


def group_rows_of(group_scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `lay_out_groups`, with what was filled in."""
    return group_scale if group_scale.dim() == 2 else group_scale.transpose(1, 2).flatten(0, 1)


def in_turns(gate: torch.Tensor, up: torch.Tensor, turn: int) -> torch.Tensor:
    """`turn` rows of one and then as many of the other; each filled up to whole turns with zeros."""
    sides = [F.pad(x.detach(), (*(0, 0) * (x.dim() - 1), 0, -len(x) % turn)) for x in (gate, up)]
    return torch.stack([side.unflatten(0, (-1, turn)) for side in sides], dim=1).flatten(0, 2)


def out_of_turns(rows: torch.Tensor, width: int, turn: int) -> list[torch.Tensor]:
    """The inverse: the first `width` rows of each side."""
    turns = rows.unflatten(0, (-1, 2, turn))
    return [turns[:, side].flatten(0, 1)[:width] for side in (0, 1)]


def stored_shape(precision: str, outputs: int, inputs: int) -> tuple[int, int]:
    """The shape of the values in rows."""
    return padded(outputs), row_length(precision, inputs)
