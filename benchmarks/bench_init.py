"""What each way of starting the side network gives on TREC with MiniLM, three seeds each."""

from __future__ import annotations

import statistics

from benchmarks.runs import SEEDS, text_files, train_ladder
from tlfast.ladder.config import INITS


def test_init(benchmark, tmp_path):
    files = text_files("trec")
    runs: dict[str, list[dict[str, float]]] = {init: [] for init in INITS}

    def all_seeds() -> None:
        for seed in SEEDS:
            for init in INITS:
                metrics = train_ladder(files, seed, tmp_path / f"{init}-{seed}", "--init", init)
                runs[init].append({"accuracy": metrics["accuracy"], "dev": metrics["dev"]["accuracy"]})

    benchmark.pedantic(all_seeds, rounds=1)
    mean = {init: statistics.mean(run["accuracy"] for run in found) for init, found in runs.items()}
    benchmark.extra_info["runs"] = runs
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy by initialisation, TREC, MiniLM-L6, mean of {len(SEEDS)} seeds",
        "ours": ", ".join(f"{init} {100 * accuracy:.1f} %" for init, accuracy in mean.items()),
        "peer": "-",
        "how": "tlfast ladder train --init pca",
    }
