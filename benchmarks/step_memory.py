"""What training adds to a process that holds the model: python -m benchmarks.step_memory METHOD prints bytes; Linux.

bert-base dimensions, random weights, 32 x 128 tokens, three steps of forward, backward and AdamW. METHOD: a tap storage
of a ladder with r=8, with ":bf16" behind it where the backbone is to be in that precision; "lora" (r=8) or "full".
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from torch import nn

from benchmarks.peers import bert_base, full, ladder, lora, text_batch, training_step

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make(method: str) -> nn.Module:
    """The model of a method, in train mode."""
    if method in ("lora", "full"):
        return lora() if method == "lora" else full()
    storage, _, precision = method.partition(":")
    return ladder(bert_base(), precision=precision or "fp32", tap_storage=storage)


def added(method: str, steps: int = 3) -> int:
    """The most resident bytes while training, beyond those before it."""
    model, batch = make(method), text_batch(32, 128)
    gc.collect()
    CLEAR.write_text("5")  # the kernel's peak begins anew: making the model had one of its own
    before = _kernel_says("VmRSS")
    step = training_step(model, batch)
    for _ in range(steps):
        step()
    return _kernel_says("VmHWM") - before


def _kernel_says(name: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(added(sys.argv[1]))
