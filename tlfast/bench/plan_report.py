"""A plan for people: its rows as a table for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ..planning import Row
from .comparison import in_bytes

_GIB = 2**30
# what a bar is made of, from the left
_PARTS = {
    "weights": "#b8c1c9",
    "optimizer state": "#7a8794",
    "kept for the backward pass": "#1f6f8b",
    "gradients and temporary": "#e0a458",
}


def plan_table(rows: Sequence[Row], title: str, batch: int, samples: int | None) -> Table:
    """The rows as a table. samples: whose cache is given, None for one sample's."""
    cache = "cache, a sample" if samples is None else f"cache, {samples:,} samples"
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("method", "precision", "taps"):
        table.add_column(column)
    for column in ("weights", "saved, a sample", "optimizer", "peak, whole", cache, "step", "cached"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            row.setting["precision"],
            row.setting.get("tap_storage", ""),
            in_bytes(row.weights),
            in_bytes(row.saved / batch),
            in_bytes(row.optimizer),
            in_bytes(row.weights + row.peak),
            "" if row.cache_sample is None else in_bytes(row.cache_sample * (samples or 1)),
            f"{row.forwards:.2f}",
            "" if row.cached_forwards is None else f"{row.cached_forwards:.2f}",
        )
    return table


def draw_plan(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw what each row holds at its peak as a stacked bar, as a PNG."""
    figure = Figure(figsize=(9.0, 1.6 + 0.26 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = max(row.weights + row.peak for row in rows)
    unit, size = ("GiB", _GIB) if largest >= _GIB else ("MiB", 2**20)
    places, left = range(len(rows)), [0.0] * len(rows)
    for index, (name, colour) in enumerate(_PARTS.items()):
        widths = [_parts(row)[index] / size for row in rows]
        axes.barh(places, widths, left=left, color=colour, label=name, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in zip(places, rows, strict=True):
        axes.text(
            left[place] + 0.008 * largest / size, place, in_bytes(row.weights + row.peak), va="center", fontsize=7
        )
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    axes.set_xlim(0, 1.1 * largest / size)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{unit} at the peak of a step")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(_PARTS), frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    figure.savefig(path, format="png")


def smallest(rows: Sequence[Row]) -> str:
    """The least memory of each method, in one line."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.method not in best or row.weights + row.peak < best[row.method].weights + best[row.method].peak:
            best[row.method] = row
    return "; ".join(f"{_label(row)}: {in_bytes(row.weights + row.peak)}" for row in best.values())


def _parts(row: Row) -> tuple[int, int, int, int]:
    """Bytes of _PARTS; together what the row holds at its peak."""
    return row.weights, row.optimizer, row.saved, row.peak - row.optimizer - row.saved


def _label(row: Row) -> str:
    storage = row.setting.get("tap_storage")
    return f"{row.method}, {row.setting['precision']}" + (f", {storage}" if storage else "")
