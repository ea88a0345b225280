"""The picture of a graph's schema: its node types, its relations, and the metapaths between two of the types."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SOURCE, _TARGET, _OTHER, _USED, _UNUSED = "#1f6f8b", "#c8553d", "#7a8794", "#1f6f8b", "#c3cad1"
_MOST_PATHS = 6  # listed below the picture
_Relation = tuple[str, str, str]


def draw_schema(
    path: Path,
    num_nodes: Mapping[str, int],
    num_edges: Mapping[_Relation, int],
    metapaths: Sequence[tuple[Sequence[_Relation], str]],
    source: str,
    target: str,
) -> None:
    """Draw the types on a circle, an arrow for each relation, those on a metapath in colour, as a PNG.

    metapaths: the relations of each, and its description, which is written below.
    """
    listed = [text for _, text in metapaths[:_MOST_PATHS]]
    if len(metapaths) > _MOST_PATHS:
        listed.append(f"and {len(metapaths) - _MOST_PATHS} more")
    figure = Figure(figsize=(7.5, 5.6 + 0.22 * len(listed)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(-1.75, 1.75)
    axes.set_ylim(-1.45, 1.45)
    places = _circle(list(num_nodes))
    used = {relation for relations, _ in metapaths for relation in relations}
    between: dict[tuple[str, str], int] = {}
    for relation, count in sorted(num_edges.items(), key=lambda item: item[0] in used):
        ends = relation[0], relation[2]
        between[ends] = between.get(ends, 0) + 1
        _arrow(axes, places, relation, count, relation in used, between[ends])
    for node_type, (x, y) in places.items():
        colour = {source: _SOURCE, target: _TARGET}.get(node_type, _OTHER)
        role = {source: "\nlabels", target: "\nto predict"}.get(node_type, "")
        text = f"{node_type}\n{num_nodes[node_type]:,}{role}"
        box = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "white"}
        axes.text(x, y, text, color="white", ha="center", va="center", fontsize=9, zorder=3, bbox=box, parse_math=False)
    title = "\n".join(["metapaths: " + listed[0], *listed[1:]])
    axes.set_title(title, fontsize=8, loc="left", y=-0.06, va="top", parse_math=False)  # names may have dollars in them
    figure.savefig(path, format="png")


def _circle(types: list[str]) -> dict[str, tuple[float, float]]:
    angles = [math.pi / 2 + 2 * math.pi * i / len(types) for i in range(len(types))]
    return {t: (1.25 * math.cos(angle), 1.1 * math.sin(angle)) for t, angle in zip(types, angles, strict=True)}


def _arrow(
    axes: Any, places: Mapping[str, tuple[float, float]], relation: _Relation, count: int, used: bool, nth: int
) -> None:
    """A bent arrow, its name and its number of edges beside the middle of the bend; a loop for a type with itself."""
    (x0, y0), (x1, y1) = places[relation[0]], places[relation[2]]
    colour, width = (_USED, 2.0) if used else (_UNUSED, 1.2)
    bend = 0.12 + 0.13 * (nth - 1)
    text = f"{relation[1]}  {count:,}"
    if relation[0] == relation[2]:
        length = math.hypot(x0, y0) or 1.0
        out = x0 / length, y0 / length
        begin, end = (x0 - 0.16, y0), (x0 + 0.16, y0)
        place = x0 + 0.42 * out[0], y0 + (0.34 + 0.1 * (nth - 1)) * (1 if out[1] >= 0 else -1)
        style = f"arc3,rad={-1.6 if out[1] >= 0 else 1.6}"
    else:
        begin, end, style = (x0, y0), (x1, y1), f"arc3,rad={bend}"
        # a quadratic curve with this control point; names stand nearer to where an arrow begins, apart from those back
        x, y = (x0 + x1) / 2 + bend * (y1 - y0), (y0 + y1) / 2 - bend * (x1 - x0)
        t = 0.36
        place = _at(t, x0, x, x1), _at(t, y0, y, y1)
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": width, "connectionstyle": style, "shrinkA": 26, "shrinkB": 30}
    axes.annotate("", end, begin, arrowprops=arrow, zorder=2 if used else 1)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    look: dict[str, Any] = {
        "fontsize": 7,
        "ha": "center",
        "va": "center",
        "color": "#333333" if used else _OTHER,
        "zorder": 2.5,
    }
    axes.text(*place, text, bbox=box, parse_math=False, **look)


def _at(t: float, begin: float, control: float, end: float) -> float:
    """A coordinate of a quadratic Bézier curve."""
    return (1 - t) ** 2 * begin + 2 * t * (1 - t) * control + t**2 * end
