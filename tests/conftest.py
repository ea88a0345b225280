"""Shared fixtures: GPU tests skip without a GPU, Triton kernels run interpreted there, outputs start as NaN."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# the same examples in every run: a red test then shows what the change did, not what the dice did
settings.register_profile(
    "tlfast",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tlfast")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # so a shell starts its background jobs, and Ctrl-C could not be tested there
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # must be set before tlfast is imported: Triton reads it when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # read by now; a pytest that a test starts is not the one these were meant for, those that share out the tests are
    if getattr(config.option, "numprocesses", None) is None or hasattr(config, "workerinput"):
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# parameter sets of a test under which its lines are counted: further ones hardly reach others, and counting takes more
# time than most tests
_MEASURED = 2
_runs: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    test = item.nodeid.partition("[")[0]
    _runs[test] += 1
    coverage = sys.modules.get("coverage")
    measured = coverage and coverage.Coverage.current()
    if measured is None or _runs[test] <= _MEASURED:
        return (yield)
    measured.stop()
    try:
        return (yield)
    finally:
        measured.start()


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set {variable} to where it is")
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public data sets; skips where it is missing."""
    return _folder("TLFAST_DATA", "../shared/data")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """The folder of golden values; skips where it is missing."""
    return _folder("TLFAST_GOLDEN", "../shared/golden")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty starts as NaN, so that an output element a kernel forgets to write fails the test."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                out.detach().fill_(float("nan"))  # detached: PyTorch itself makes leaves that require grad
            return out

        return allocate_poisoned

    with torch.device("meta"):  # PyTorch remembers, at the first such block, which functions it is for: the real ones
        torch.empty(0)
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def fresh_process() -> Callable[..., str]:
    """Runs Python code in a process of its own and returns its standard output; environment variables as keywords."""

    def run(code: str, **environment: str) -> str:
        inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**inherited, **environment}, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two torch threads, whatever the machine has: kernels must split their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
