"""The static report of the frozen forward's kernels: made anew, checked, and written where it changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")

from tests.aot.static_report import MODELS, blocks_per_multiprocessor

REPORT = ROOT / "benchmarks" / "results" / "static.json"
KERNELS = {
    "norm_tap_fwd_kernel",
    "quantise_rows_fwd_kernel",
    "int8_linear_fwd_kernel",
    "fp8_linear_fwd_kernel",
    "nf4_linear_fwd_kernel",
    "int8_weight_linear_fwd_kernel",
    "activate_fwd_kernel",
}


@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [
        (128, 0, 8, (2, 228, 8)),
        (129, 98304, 8, (1, 2, 8)),
        (32, 0, 1, (64, 228, 32)),
        (255, 227 * 1024, 4, (2, 1, 16)),
    ],
)
def test_occupancy(registers, shared, warps, blocks):
    assert tuple(blocks_per_multiprocessor(registers, shared, warps).values()) == blocks


def test_report():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot.static_report"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    entries = report["kernels"]
    expected = {(kernel, model.name) for kernel in KERNELS for model in MODELS}
    expected |= {("rotate_fwd_kernel", model.name) for model in MODELS if model.gated}
    assert {(e["kernel"], e["model"]) for e in entries} == expected
    for entry in entries:
        assert entry["blocks_per_multiprocessor"] >= 1 and 0 < entry["occupancy"] <= 1, entry
    # 2 * 16384 * 4096 * 6144 operations at 1576e12 a second, and 8 bytes a number at 4.3e12
    floors = {(e["kernel"], e["shape"]): (e["floor_microseconds"], e["bound"]) for e in entries}
    assert floors["int8_linear_fwd_kernel", "qkv 16384 x 4096 to 6144"] == (523, "operations")
    assert floors["norm_tap_fwd_kernel", "16384 x 4096"] == (125, "bytes")
    if not REPORT.is_file() or REPORT.read_text(encoding="utf-8") != done.stdout:
        REPORT.write_text(done.stdout, encoding="utf-8")
