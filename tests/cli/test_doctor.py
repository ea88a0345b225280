"""tlfast doctor says what is there, and why something is not."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")

import torch
from typer.testing import CliRunner

from tlfast import _native, ops
from tlfast.bench import measure
from tlfast.cli import app
from tlfast.cli.doctor import report
from tlfast.ops import _dispatch

CPU_ONLY = {
    "versions": {"python": "3.11", "tlfast": "0.1.0", "torch": "2.6", "triton": None},
    "machine": {"cpu": "A processor", "cores": 4, "torch_threads": 2, "torch_isa": "AVX2", "cuda": None},
    "native": {"loaded": False, "why_not": "the reason"},
    "gpus": [],
    "frozen": {
        "fp32": {"path": "module", "why": "fp32 is exact"},
        "int8": {
            "path": "packed",
            "why": "where they can",
            "frozen_linear": {"auto": "reference", "why": "the reason"},
            "packed_attention": {"auto": "buckets", "why": "no native: the reason"},
        },
        "fp8": {"path": "refused", "why": "it needs a GPU"},
    },
    "ops": {
        "rung": {
            "auto": "reference",
            "why": "no native: the reason",
            "implementations": {"reference": "available", "native": "the reason"},
        }
    },
}


def run(*arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def in_a_fresh_process(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_json_is_one_object_with_every_finding():
    found = json.loads(run("--json"))
    assert found["versions"] == measure.environment()["versions"]
    assert found["ops"] == ops.describe()
    assert found["ops"]["rung"]["implementations"] == ops.implementations("rung")
    assert found["native"]["loaded"] == (_native.why_not() is None)
    assert list(found["frozen"]) == ["fp32", "bf16", "int8", "nf4", "fp8"]
    for precision in ("bf16", "int8", "nf4"):
        taken = found["frozen"][precision]["frozen_linear"]
        assert (taken["auto"] == "native") == (_native.why_not() is None and not torch.cuda.is_available())
        if torch.cuda.is_available() and "triton" not in _dispatch.MISSING:
            assert taken["auto"] == "triton"
    if not torch.cuda.is_available():
        assert found["frozen"]["fp8"]["path"] == "refused"
        assert "needs a CUDA GPU of compute capability 9.0 or newer" in found["frozen"]["fp8"]["why"]
        assert found["frozen"][precision]["packed_attention"]["auto"] == found["ops"]["packed_attention"]["auto"]


def test_lines_name_every_operation_and_implementation():
    text = run()
    for name, op in ops.describe().items():
        assert f'{name}: "auto" takes {op["auto"]} ({op["why"]})' in text
        for implementation, state in op["implementations"].items():
            assert any(line.split(maxsplit=1) == [implementation, state] for line in text.splitlines())


def test_lines_of_a_bare_machine():
    assert report(CPU_ONLY) == [
        "versions        python 3.11, tlfast 0.1.0, torch 2.6, triton not installed",
        "processor       A processor, 4 cores, 2 PyTorch threads, PyTorch uses AVX2",
        "native library  missing: the reason",
        "GPU             none (this PyTorch is built without CUDA)",
        "frozen forward",
        "  fp32  blocks as transformers runs them: fp32 is exact",
        "  int8  blocks over packed tokens where they can: frozen_linear reference (the reason), "
        "packed_attention buckets (no native: the reason)",
        "  fp8   refused: it needs a GPU",
        "operations",
        '  rung: "auto" takes reference (no native: the reason)',
        "    reference  available",
        "    native     the reason",
    ]


@pytest.mark.parametrize(
    "architectures, line",
    [
        ("80,90", "native library  loaded; CPU kernels use x86-64-v3; CUDA kernels for sm 80,90"),
        ("", "native library  loaded; CPU kernels use x86-64-v3; no CUDA kernels: it was built without nvcc"),
    ],
)
def test_line_of_the_native_library(architectures, line):
    native = {"loaded": True, "cpu_isa": "x86-64-v3", "cuda_architectures": architectures}
    assert line in report({**CPU_ONLY, "native": native})


def test_line_of_the_gpu():
    machine = {**CPU_ONLY["machine"], "cuda": "13.0"}
    assert "GPU             none visible (PyTorch built for CUDA 13.0)" in report({**CPU_ONLY, "machine": machine})
    gpu = {"name": "A card", "capability": "9.0", "memory_bytes": 80 * 2**30}
    lines = report({**CPU_ONLY, "machine": machine, "gpus": [gpu]})
    assert "GPU             A card, sm 9.0, 80 GiB (PyTorch built for CUDA 13.0)" in lines


def test_works_without_the_native_library():
    code = "import sys; sys.argv = ['tlfast', 'doctor', '--json']; from tlfast.cli import main; main()"
    found = in_a_fresh_process(code, TLFAST_DISABLE_NATIVE="1")
    assert found["native"] == {"loaded": False, "why_not": "blocked by TLFAST_DISABLE_NATIVE"}
    assert found["machine"]["native_isa"] is None
    assert found["ops"]["rung"]["implementations"]["native"] == "blocked by TLFAST_DISABLE_NATIVE"
    assert found["ops"]["rung"]["auto"] != "native"
    if not torch.cuda.is_available():
        taken = {"auto": "reference", "why": "blocked by TLFAST_DISABLE_NATIVE"}
        assert found["frozen"]["int8"]["frozen_linear"] == taken


def test_works_without_transformers_and_triton():
    code = """
import importlib.metadata, importlib.util, sys
sys.argv = ["tlfast", "doctor", "--json"]
blocked = ("transformers", "triton", "accelerate", "matplotlib", "sklearn")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name in blocked else find_spec(name, *rest)
def installed(name):
    if name in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
from tlfast.cli import main
main()
"""
    found = in_a_fresh_process(code)
    assert found["versions"]["transformers"] is None and found["versions"]["triton"] is None
    assert found["ops"]["rung"]["implementations"]["triton"] == "triton is not installed; pip install triton"
