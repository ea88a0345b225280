"""Every Triton kernel of the rung compiled for each GPU generation, without a GPU: no spills, and it fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, CUDA programming guide
WIDTHS = (48, 96, 192, 512)
KERNELS = {"rung_fwd_kernel", "rung_bwd_kernel", "rung_bwd_weight_kernel"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_without_spills(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_rung.py"), str(capability), ",".join(map(str, WIDTHS))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["kernel"], row["width"]) for row in rows} == {(k, w) for k in KERNELS for w in WIDTHS}
    for row in rows:
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_MEMORY[capability], f"shared memory: {row}"
