"""The two processes are shared by all tests of this folder."""

from collections.abc import Iterator

import pytest
import torch

from .processes import Processes


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Processes]:
    """Runs function(rank, *arguments) in two processes of a gloo group and returns what both gave."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    processes = Processes()
    yield processes
    processes.stop()
