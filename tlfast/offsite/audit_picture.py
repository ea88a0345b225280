"""The picture of an audit: how near every tensor of an emulator's middle is to one of the full model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .audit import Audit, Finding

_WIDEST = 40  # letters of a tensor's name


def draw_audit(path: Path, audit: Audit) -> None:
    """Draw a cell for each tensor of each block of the middle, coloured by its cosine with the nearest original.

    A cross marks those that have numbers of the original to the bit.
    """
    middle = [finding for finding in audit.findings if finding.part == "middle"]
    blocks = sorted({finding.block for finding in middle if finding.block is not None})
    names = list(dict.fromkeys(map(_short, middle)))
    cosines = np.full((len(names), len(blocks)), np.nan)
    figure = Figure(figsize=(4.2 + 0.35 * len(blocks), 1.8 + 0.28 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for finding in middle:
        assert finding.block is not None
        row, column = names.index(_short(finding)), blocks.index(finding.block)
        cosines[row, column] = finding.cosine
        if finding.equal:
            axes.plot(column, row, marker="x", color="white", markersize=5)
    picture = axes.imshow(cosines, vmin=0, vmax=1, cmap="viridis_r", aspect="auto")
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("block of the full model")
    figure.colorbar(picture, ax=axes, label="cosine with the nearest original tensor")
    figure.suptitle(
        f"{audit.recipe}: {100 * audit.verbatim_matrices:.1f} % of the middle's matrices sent to the bit (x),\n"
        f"{100 * audit.revealed_matrices:.1f} % to the bit or as good as that",
        fontsize=9,
    )
    figure.savefig(path, format="png")


def _short(finding: Finding) -> str:
    """The name of a tensor inside its block."""
    name = finding.name.split(".")
    inside = next(i for i, part in enumerate(name) if part.isdigit())
    return ".".join(name[inside + 1 :])[-_WIDEST:]
