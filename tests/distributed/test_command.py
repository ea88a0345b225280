"""tlfast ladder train under torchrun: what one process gives, from two that share each batch; also after --resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.ladder_runs import save_backbone, write_sentences

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]


def command(folder, out, *more):
    files = ["--train", str(folder / "train.tsv"), "--test", str(folder / "test.tsv")]
    options = ["--reduction", "2", "--batch-size", "8", "--dropout", "0", "--epochs", "10", "--json"]
    return ["ladder", "train", "--backbone", str(folder / "bert"), *files, *options, "--out", str(out), *more]


def start(arguments, processes):
    tlfast = [sys.executable, "-c", "from tlfast.cli import main; main()"]
    launcher = [sys.executable, "-m", *TORCHRUN] if processes == 2 else []
    return subprocess.Popen(
        [*launcher, *tlfast, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def metrics(arguments, processes):
    run = start(arguments, processes)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return json.loads(out)


@pytest.fixture
def folder(tmp_path):
    save_backbone(tmp_path / "bert")
    write_sentences(tmp_path / "train.tsv", 89, seed=1)  # 80 of them train: ten whole batches
    write_sentences(tmp_path / "test.tsv", 30, seed=2)
    return tmp_path


def test_two_processes_give_what_one_gives_and_go_on_exactly(folder):
    one, two = (metrics(command(folder, folder / f"run{n}"), n) for n in (1, 2))
    resumed = interrupt_and_resume(command(folder, folder / "cut"), folder / "cut" / "checkpoints")
    for part in ("train", "dev", "test"):
        assert two[part] == pytest.approx(one[part], abs=1e-5), part
        assert resumed[part] == two[part], part
    assert json.loads((folder / "run2" / "metrics.json").read_text())["test"] == two["test"]


def interrupt_and_resume(arguments, checkpoints):
    run = start(arguments, 2)
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0, err
    return metrics([*arguments, "--resume"], 2)
