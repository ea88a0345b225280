"""The peak of a step against counts known beforehand."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import peak_bytes


@pytest.fixture
def x():
    return torch.randn(1000)


def test_the_peak_is_the_most_that_is_held_at_once(x):
    def chain():
        first = x.exp()
        second = first.sin()
        del first
        return second.cos()

    assert peak_bytes(chain) == 2 * 4000
    assert peak_bytes(lambda: x.view(10, 100)) == 0


@pytest.mark.parametrize("seen_before", [False, True])
def test_what_was_freed_on_the_way_counts_and_what_was_there_before_does_not(x, seen_before):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=seen_before):
        held = [torch.empty(5000)]

    def swap():
        held.clear()
        torch.empty(3000)
        return x + 1

    assert peak_bytes(swap) == 3000 * 4
