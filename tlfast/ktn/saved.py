"""A fitted KTN as a folder: config.json and model.safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.errors import InputError
from ..graph import HeteroGraph
from .training import KtnModel, KtnSettings

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: KtnModel, graph: HeteroGraph, settings: KtnSettings, folder: Path) -> None:
    """Write weights, settings and the graph's schema into an existing folder."""
    config = {
        "settings": asdict(settings),
        "num_classes": model.classifier.weight.shape[0],
        "class_names": graph.class_names,
        "features": {t: graph.x[t].shape[1] for t in graph.node_types},
        "edge_types": [list(edge_type) for edge_type in graph.edge_types],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def load_model(folder: Path, graph: HeteroGraph) -> tuple[KtnModel, KtnSettings, dict[str, Any]]:
    """The model, its settings and its config.json, for a graph with the schema of training.

    Raises InputError where files are missing or damaged, or the graph has other types, relations or feature widths.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        settings, weights = KtnSettings(**config["settings"]), load_file(folder / WEIGHTS)
        trained = config["features"], [tuple(edge_type) for edge_type in config["edge_types"]]
        num_classes, names = config["num_classes"], config["class_names"]
        named = names is None or (isinstance(names, list) and len(names) == num_classes)
        if not isinstance(num_classes, int) or num_classes < 1 or not named:
            raise ValueError(f"num_classes is {num_classes!r}, class_names are {str(names)[:80]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: is no folder that tlfast ktn fit wrote, or is damaged ({error})") from error
    given = {t: graph.x[t].shape[1] if t in graph.x else 0 for t in graph.node_types}
    if (given, graph.edge_types) != trained:
        raise InputError(
            f"{folder}: was trained on the types {trained[0]} (features of each) and relations {trained[1]}, but the"
            f" graph has {given} and {graph.edge_types}"
        )
    model = KtnModel(graph, settings, num_classes)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{folder}: its weights do not fit its {CONFIG} ({error}); fit again") from error
    return model, settings, config


def predictions(log_probabilities: torch.Tensor, class_names: list[str] | None) -> list[dict[str, Any]]:
    """A row for each node: its index, its likeliest label, and that one's probability."""
    best = log_probabilities.max(1)
    names = class_names or [str(i) for i in range(log_probabilities.shape[1])]
    pairs = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    return [{"node": i, "label": names[label], "probability": round(p, 6)} for i, (label, p) in enumerate(pairs)]
