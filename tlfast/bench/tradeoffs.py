"""The picture of what accuracy costs, from benchmarks/results/*.json.

A benchmark asks for a panel by extra_info["tradeoff"] = {"what": the panel's title, "cost": what the horizontal axis
shows, "points": {method: [cost, accuracy between 0 and 1]}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..data import InputError

_OURS, _PEER = "#1f6f8b", "#7a8794"
_KEYS = {"what", "cost", "points"}
_COLUMNS = 2
_LINE = 0.06  # of a panel's height: what a name takes


def panels(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What benchmarks ask for, each once: of machines that ran the same one, the last in alphabetical order.

    Raises InputError for an entry that is not as this module says.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for machine, content in results.items():
        for entry in content["benchmarks"]:
            asked = entry["extra_info"].get("tradeoff")
            if asked is None:
                continue
            if set(asked) != _KEYS or not asked["points"]:
                raise InputError(f"{machine}.json, {entry['fullname']}: tradeoff is to have {sorted(_KEYS)} and points")
            found[asked["cost"], asked["what"]] = {**asked, "machine": machine}
    return [found[key] for key in sorted(found)]


def draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Draw every panel: accuracy over cost on a logarithmic axis; an SVG, with the same bytes each time.

    Returns whether there was anything to draw.
    """
    shown = panels(results)
    if not shown:
        return False
    columns = min(len(shown), _COLUMNS)
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "tlfast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.0 * columns, 3.2 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        for number, panel in enumerate(shown):
            _draw_panel(figure.add_subplot(rows, columns, number + 1), panel)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _draw_panel(axes: Any, panel: Mapping[str, Any]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    points = sorted(panel["points"].items(), key=lambda point: point[1][1])
    costs = [cost for _, (cost, _) in points]
    middle = (min(costs) * max(costs)) ** 0.5
    for name, (cost, accuracy) in points:
        axes.plot(cost, 100 * accuracy, marker="o", color=_colour(name))
    axes.margins(0.12, 0.2)
    bottom, top = axes.get_ylim()
    line, height = (top - bottom) * _LINE, -float("inf")
    for name, (cost, accuracy) in points:
        height = max(100 * accuracy, height + line)  # names of neighbours stand one above the other
        left = cost > middle  # text beside its point, towards the middle
        axes.annotate(
            f"{name} {100 * accuracy:.1f} %",
            (cost, height),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            color=_colour(name),
        )
    axes.set_title(f"{panel['what']} ({panel['machine']})", loc="left", fontsize=9, parse_math=False)
    axes.set_xlabel(panel["cost"], fontsize=8)
    axes.set_ylabel("test accuracy, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(name: str) -> str:
    return _OURS if name.startswith("ladder") else _PEER
