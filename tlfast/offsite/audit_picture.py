"""The picture of an audit: how near every tensor of an emulator's middle is to one of the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .audit import Audit, Finding

_WIDEST = 40  # letters of a tensor's name
_MOST_FIGURES = 16  # blocks up to which the cosines are written into the cells
_DARK = 0.6  # cosine from which letters on a cell are white
_NOT_SENT = "0.92"


def draw_audit(path: Path, audit: Audit) -> None:
    """Draw a cell for each tensor of each block of the middle, coloured by its cosine with the nearest original.

    Matrices come first, then norms and biases, below a line. A cross marks those that have numbers of the original to
    the bit; blocks between those that are sent, which are not, are grey.
    """
    middle = [finding for finding in audit.findings if finding.part == "middle" and finding.block is not None]
    sent = {finding.block for finding in middle if finding.block is not None}
    blocks = list(range(min(sent, default=0), max(sent, default=-1) + 1))
    matrices = list(dict.fromkeys(_short(finding) for finding in middle if len(finding.shape) > 1))
    names = list(dict.fromkeys([*matrices, *map(_short, middle)]))
    cells = {(names.index(_short(finding)), blocks.index(finding.block or 0)): finding for finding in middle}
    cosines = np.full((len(names), len(blocks)), np.nan)
    for cell, finding in cells.items():
        cosines[cell] = finding.cosine
    figure = Figure(figsize=(4.6 + 0.5 * len(blocks), 2.0 + 0.28 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(_NOT_SENT)
    picture = axes.imshow(cosines, vmin=0, vmax=1, cmap="YlOrRd", aspect="auto")
    for (row, column), finding in cells.items():
        text = f"{finding.cosine:.2f} " if len(blocks) <= _MOST_FIGURES else ""
        _write(axes, row, column, text + "x" * bool(finding.equal), finding.cosine)
    _finish(axes, blocks, names, len(matrices))
    axes.set_title(
        f"{audit.recipe}: of the middle's matrices {100 * audit.verbatim_matrices:.1f} % are sent to the "
        f"bit (x),\n{100 * audit.revealed_matrices:.1f} % to the bit or as good as that (cosine of at least 0.99)",
        fontsize=9, loc="right",
    )  # fmt: skip
    figure.colorbar(picture, ax=axes, label="cosine with the nearest original tensor")
    figure.savefig(path, format="png")


def _write(axes: Any, row: int, column: int, text: str, cosine: float) -> None:
    colour = "white" if cosine > _DARK else "black"
    axes.text(column, row, text.strip(), color=colour, fontsize=7, ha="center", va="center")


def _finish(axes: Any, blocks: list[int], names: list[str], matrices: int) -> None:
    """Names, a grid between the cells, and the line between matrices and the rest."""
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(np.arange(len(blocks) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.axhline(matrices - 0.5, color="black", linewidth=1)
    axes.set_xlabel("block of the full model's middle (grey: not sent)")


def _short(finding: Finding) -> str:
    """The name of a tensor inside its block."""
    name = finding.name.split(".")
    inside = next(i for i, part in enumerate(name) if part.isdigit())
    return ".".join(name[inside + 1 :])[-_WIDEST:]
