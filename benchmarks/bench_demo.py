"""The demo as a user runs it, in a process of its own: what a ladder gains over a linear probe, and at what cost."""

from __future__ import annotations

import json
import subprocess
import sys


def test_demo(benchmark, tmp_path):
    command = [
        sys.executable,
        "-c",
        "from tlfast.cli import main; main()",
        "demo",
        "--json",
        "--out",
        str(tmp_path / "demo"),
    ]
    done = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "check": True}, rounds=1)
    metrics = json.loads(done.stdout)
    probe, ladder = metrics["methods"]
    benchmark.extra_info["demo"] = metrics
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy on docstrings, MiniLM-L6, {metrics['examples']['train']:,} training texts",
        "ours": f"{100 * ladder['accuracy']:.1f} % in {ladder['seconds']:.0f} s",
        "peer": f"linear probe {100 * probe['accuracy']:.1f} % in {probe['seconds']:.0f} s",
        "how": "tlfast demo",
    }
