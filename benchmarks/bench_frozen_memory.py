"""What a prepared folder saves: resident memory of a fresh process, and the seconds until its model is there.

Memory is the most of a process that loads a model and runs one batch of 16 x 128 tokens with every tap. Linux only: the
kernel's VmHWM, since getrusage hands a process the peak of the one that started it.
tlfast loads a prepared folder, in which no float32 model is; transformers loads the same model at the same precision
(bf16 beside int8 and nf4, which it does not have on a CPU). Each imports what it needs and nothing else.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from benchmarks.frozen import PEER, PRECISIONS, freeze_or_reason, minilm
from benchmarks.peers import bert_base
from tlfast.backbone import FrozenBackbone
from tlfast.bench.measure import medians, timed_rounds

MODELS = {"MiniLM-L6": minilm, "bert-base dimensions": bert_base}
_BATCH = """
import torch
ids = torch.randint(5, 30_000, (16, 128), generator=torch.Generator().manual_seed(0))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
"""
_OURS = """
from tlfast.backbone import FrozenBackbone
taps = FrozenBackbone.from_pretrained(FOLDER)(packed=True, **batch).taps
"""
_THEIRS = """
from transformers import AutoModel
model = AutoModel.from_pretrained(FOLDER, dtype=torch.DTYPE).eval()
with torch.no_grad():
    taps = model(**batch, output_hidden_states=True).hidden_states
"""
_PEAK = """
assert torch.isfinite(taps[-1].float()).all()
lines = open("/proc/self/status").read().splitlines()
print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
"""
_ROUNDS = 3
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory(benchmark: Any, tmp_path: Path, name: str, precision: str) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("peaks are read from Linux's /proc")
    _save(name, precision, tmp_path)
    peer = PEER[precision]
    ours, theirs = (_OURS, tmp_path / "prepared"), (_THEIRS.replace("DTYPE", _DTYPES[peer]), tmp_path / "model")
    found: dict[str, list[int]] = {"ours": [], "transformers": []}
    for _ in range(_ROUNDS):  # the same program differs by 20 MiB from run to run
        found["ours"].append(_peak(*ours))
        found["transformers"].append(_peak(*theirs))
    benchmark.pedantic(_peak, args=ours, rounds=1)
    peaks = {name: statistics.median(values) for name, values in found.items()} | {"torch alone": _torch_alone()}
    benchmark.extra_info["peak_bytes"] = peaks
    mib = {key: value / 2**20 for key, value in peaks.items()}
    benchmark.extra_info["row"] = {
        "what": f"Peak resident memory of a fresh process, one batch of 16 x 128; {name}, {precision}",
        "ours": f"{mib['ours']:.0f} MiB",
        "peer": f"transformers {peer} {mib['transformers']:.0f} MiB (PyTorch alone {mib['torch alone']:.0f} MiB)",
        "how": "tlfast bench frozen_memory",
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_seconds_to_load(benchmark: Any, tmp_path: Path, name: str, precision: str) -> None:
    """Files are in the page cache, libraries are imported."""
    _save(name, precision, tmp_path)
    peer = PEER[precision]
    dtype = getattr(torch, _DTYPES[peer])
    functions = {
        "ours": lambda: FrozenBackbone.from_pretrained(tmp_path / "prepared"),
        "transformers": lambda: AutoModel.from_pretrained(tmp_path / "model", dtype=dtype),
        "freeze": lambda: freeze_or_reason(AutoModel.from_pretrained(tmp_path / "model"), precision),
    }
    seconds = medians(timed_rounds(functions, 5))
    benchmark.pedantic(functions["ours"], rounds=1)
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["row"] = {
        "what": f"From a folder to a model; {name}, {precision}",
        "ours": f"{1000 * seconds['ours']:.0f} ms",
        "peer": f"transformers {peer} {1000 * seconds['transformers']:.0f} ms; with freeze "
        f"{1000 * seconds['freeze']:.0f} ms",
        "how": "tlfast bench frozen_memory",
    }


def _save(name: str, precision: str, folder: Path) -> None:
    """The model as transformers saves it, and prepared."""
    model = MODELS[name]()
    model.save_pretrained(folder / "model")
    frozen = freeze_or_reason(model, precision)
    if isinstance(frozen, str):
        pytest.skip(f"freeze refuses {precision}: {frozen}")
    frozen.save_pretrained(folder / "prepared")


@functools.cache
def _torch_alone() -> int:
    return _peak("taps = [torch.zeros(())]", Path())


def _peak(code: str, folder: Path) -> int:
    program = _BATCH + code.replace("FOLDER", repr(str(folder))) + _PEAK
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])
