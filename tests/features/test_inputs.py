"""Batches: every example once, in the same order always, within the budget; and made in another thread."""

import threading

import pytest

pytest.importorskip("transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from tlfast.features import inputs
from tlfast.features.inputs import Window, batches


class Lengths:
    """A source of numbers instead of texts; every seventh lost its end."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.windows = []

    def __len__(self):
        return len(self.lengths)

    def window(self, chosen):
        self.windows.append(threading.get_ident())
        lengths = [self.lengths[i] for i in chosen]
        return Window([{"x": i} for i in chosen], lengths, [j for j, i in enumerate(chosen) if i % 7 == 0])

    def collate(self, items):
        return {"x": torch.tensor([item["x"] for item in items])}


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setattr(inputs, "_WINDOW", 10)
    return 10


@given(lengths=st.lists(st.integers(0, 40), max_size=35), budget=st.integers(1, 90))
def test_every_example_once_within_the_budget_and_its_window(window, lengths, budget):
    seen = list(batches(Lengths(lengths), budget))
    assert sorted(i for batch in seen for i in batch.indices) == list(range(len(lengths)))
    for indices, tensors, cut in seen:
        assert tensors["x"].tolist() == indices
        assert cut == sum(i % 7 == 0 for i in indices)
        assert len({i // window for i in indices}) == 1
        assert (
            len(indices) == 1
            or len(indices) * max(lengths[i] for i in indices) <= budget
            or not any(lengths[i] for i in indices)
        )
    for first in range(0, len(lengths), window):
        ordered = [lengths[i] for batch in seen for i in batch.indices if i // window == first // window]
        assert ordered == sorted(ordered, reverse=True)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=35), budget=st.integers(1, 90), data=st.data())
def test_a_later_start_leaves_out_whole_batches(window, lengths, budget, data):
    whole = [batch.indices for batch in batches(Lengths(lengths), budget)]
    passed = data.draw(st.integers(0, len(whole)))
    start = sum(map(len, whole[:passed]))
    source = Lengths(lengths)
    assert [batch.indices for batch in batches(source, budget, start)] == whole[passed:]
    assert len(source.windows) == -(-len(lengths) // window) - start // window, "windows that are done are not read"


def test_batches_come_from_another_thread_and_its_errors_too(window):
    source = Lengths([3] * 25)
    list(batches(source, 30))
    assert set(source.windows).isdisjoint({threading.get_ident()})

    def broken(_items):
        raise ValueError("this picture")

    source.collate = broken
    with pytest.raises(ValueError, match="this picture"):
        list(batches(source, 30))


def test_a_closed_generator_ends_its_thread(window):
    before = threading.active_count()
    ready = batches(Lengths([3] * 1000), 3)
    next(ready)
    assert threading.active_count() == before + 1
    ready.close()
    assert threading.active_count() == before
