"""What `import tlfast` brings in and what it costs, each in a process of its own; and what the top level offers."""

import subprocess
import sys

import pytest

import tlfast

HEAVY = ("triton", "transformers", "torch_geometric", "sklearn", "matplotlib", "typer")


def test_import_brings_in_nothing_heavy_and_takes_under_0_3_s_beyond_torch(fresh_process):
    code = f"""
import sys, time, torch
before = set(sys.modules)
start = time.process_time()  # other processes on the cores do not count
import tlfast
seconds = time.process_time() - start
print(seconds, [name for name in {HEAVY} if name in sys.modules and name not in before])
"""
    seconds, brought = fresh_process(code).split(maxsplit=1)
    assert float(seconds) < 0.3
    assert brought == "[]"


def test_works_without_triton_and_without_the_native_library(fresh_process):
    code = """
import sys
for name in ("triton", "torch_geometric", "tlfast._C"):
    sys.modules[name] = None
import torch, tlfast
h, s, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 8)
z = tlfast.ops.rung(h, s, weight, None, torch.zeros(()))
z.sum().backward()
print(tuple(z.shape), tlfast.ops.implementations("rung")["native"][:26])
"""
    assert fresh_process(code) == "(2, 3, 4) native library not loaded"


def test_the_top_level_offers_the_contract():
    for name in ("freeze", "FrozenBackbone", "LadderConfig", "LadderModel"):
        assert callable(getattr(tlfast, name)) and name in dir(tlfast)
    for name in ("FrozenLinear", "HeteroConv", "Rung", "SideBlock", "UniCLLoss"):
        assert isinstance(getattr(tlfast.nn, name), type)
    assert tlfast.__version__
    with pytest.raises(AttributeError, match="no attribute 'wings'"):
        _ = tlfast.wings


def test_the_command_runs_as_a_module_of_the_installed_package():
    done = subprocess.run(
        [sys.executable, "-c", "from tlfast.cli import main; main()", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in ("ladder", "freeze", "embed", "klite", "ktn", "offsite", "demo", "doctor", "bench", "plan"):
        assert command in done.stdout
