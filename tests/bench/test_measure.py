"""The measuring instruments against counts known beforehand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tlfast.bench import measure

B, S, D, F = 4, 16, 32, 96


@pytest.fixture
def x():
    return torch.randn(B, S, D)


def bytes_of(*shapes):
    return sum(4 * torch.Size(shape).numel() for shape in shapes)


def test_saved_bytes_is_what_lives_on(x):
    assert measure.saved_bytes(lambda: x + 1) == bytes_of((B, S, D))
    assert measure.saved_bytes(lambda: (x + 1, x + 2)) == 2 * bytes_of((B, S, D))
    assert measure.saved_bytes(lambda: (x + 1).sum()) == bytes_of(())
    assert measure.saved_bytes(lambda: x.view(-1)) == 0
    assert measure.saved_bytes(lambda: None) == 0


def test_saved_bytes_of_a_feed_forward(x):
    up, down = nn.Linear(D, F), nn.Linear(F, D)
    # kept: the input of the gelu, its output (down's input), and the result; up's input existed before
    expected = bytes_of((B, S, F), (B, S, F), (B, S, D))
    assert measure.saved_bytes(lambda: down(nn.functional.gelu(up(x)))) == expected
    with torch.no_grad():
        assert measure.saved_bytes(lambda: down(nn.functional.gelu(up(x)))) == bytes_of((B, S, D))


def test_saved_bytes_does_not_count_cycles_of_garbage(x):
    def make_cycle():
        cycle = [x + 1]
        cycle.append(cycle)

    assert measure.saved_bytes(make_cycle) == 0


@pytest.mark.parametrize("seen_before", [False, True])
def test_saved_bytes_is_not_lowered_by_freeing_what_was_there_before(x, seen_before):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=seen_before):
        held = [torch.empty(1000)]

    def swap():
        held.clear()
        return x + 1

    assert measure.saved_bytes(swap) == bytes_of((B, S, D))


def test_saved_bytes_writes_nothing():
    code = "import torch; from tlfast.bench.measure import saved_bytes; print(saved_bytes(lambda: torch.empty(10)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("40\n", "")


def test_hook_bytes_counts_each_new_storage_once(x):
    up, down = nn.Linear(D, F), nn.Linear(F, D)
    assert measure.hook_bytes(lambda: up(x)) == 0  # its input and weight existed before
    assert measure.hook_bytes(lambda: down(nn.functional.gelu(up(x)))) == 2 * bytes_of((B, S, F))

    def shared():
        y = (x * up.weight.sum()).exp()  # exp keeps y; the product keeps it twice more, through views
        return y.view(-1) * y.view(-1)

    assert measure.hook_bytes(shared) == bytes_of((B, S, D))


def test_hook_bytes_counts_a_view_whole(x):
    weight = torch.randn(D, requires_grad=True)
    assert measure.hook_bytes(lambda: (x + 1)[:, :1] * weight) == bytes_of((B, S, D))


def test_rounds_are_interleaved_and_rotate():
    calls = []
    names = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure.timed_rounds(names, rounds=3, setup=lambda: calls.append("."))
    assert "".join(calls) == ".a.b.c" + ".a.b.c" + ".b.c.a" + ".c.a.b"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value > 0 for values in seconds.values() for value in values)


def test_rounds_are_refused_below_one():
    with pytest.raises(ValueError, match="rounds: got 0; pass an integer of at least 1"):
        measure.timed_rounds({"a": int}, rounds=0)


def test_medians():
    assert measure.medians({"a": [3.0, 1.0, 2.0], "b": [1.0, 4.0]}) == {"a": 2.0, "b": 2.5}


def test_peak_rss_rises_with_the_peak_and_does_not_fall():
    before = measure.peak_rss()
    torch.ones(before // 4 + 64 * 2**20 // 4)  # more than the process has held so far
    after = measure.peak_rss()
    assert after >= before + 64 * 2**20
    assert measure.peak_rss() >= after


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux's /proc knows a process's own peak")
def test_peak_rss_is_not_that_of_the_process_that_started_it():
    torch.ones(measure.peak_rss() // 4 + 64 * 2**20 // 4)
    code = "from tlfast.bench.measure import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < measure.peak_rss() - 64 * 2**20


def test_environment_says_where():
    found = measure.environment()
    assert found == json.loads(json.dumps(found))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert found["machine"]["torch_threads"] == torch.get_num_threads()
    assert (found["machine"]["gpu"] is None) == (not torch.cuda.is_available())


def test_version_of_a_missing_package():
    assert measure.version("surely-not-installed") is None


@pytest.mark.gpu
def test_saved_bytes_on_cuda():
    x = torch.randn(B, S, D, device="cuda")
    assert measure.saved_bytes(lambda: x + 1) == bytes_of((B, S, D))
