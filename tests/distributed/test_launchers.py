"""The script that the README shows, as torchrun and accelerate launch start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

SCRIPT = Path(__file__).with_name("train.py")
# without a GPU accelerate's --cpu starts one process; --multi_gpu only says that there are to be several
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_script_trains_in_two_processes(launcher, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(SCRIPT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8/8" in done.stderr, "64 texts in batches of 2 x 8, twice"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["task"] == "sequence-classification"
    assert load_file(tmp_path / "out" / "model.safetensors")["calibrated"]
