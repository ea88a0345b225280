"""Triton kernels compiled for each GPU generation, in a process without the interpreter: no spills, and they fit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import ROOT

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, CUDA programming guide


@pytest.fixture(params=SHARED_MEMORY)
def compiled_kernels(request: pytest.FixtureRequest) -> Callable[..., list[dict]]:
    """Runs tests/aot/SCRIPT.py for a GPU generation and returns its rows, each checked: no spills, and it fits."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    capability = request.param

    def run(script: str, *arguments: object) -> list[dict]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", f"tests.aot.{script}", str(capability), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        for row in rows:
            assert row["stack"] == row["local"] == 0, f"spills: {row}"
            assert row["shared"] <= SHARED_MEMORY[capability], f"shared memory: {row}"
        return rows

    return run
