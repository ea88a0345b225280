"""Tokenised datasets, padding and length buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlfast.data import Examples, LengthBuckets, PadBatch, TokenDataset

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]) + "\n")
    return transformers.BertTokenizer(str(path))


def examples(texts, pairs=None):
    return Examples(Path("x.tsv"), texts, pairs, None, list(range(2, len(texts) + 2)))


def test_texts_are_tokenised_with_special_tokens_and_targets(tokenizer):
    data = TokenDataset.tokenise(examples(["a b", "c"]), tokenizer, 16, [1, 0])
    assert data[0] == {"input_ids": [2, 5, 6, 3], "token_type_ids": [0] * 4, "attention_mask": [1] * 4, "labels": 1}
    assert (len(data), data.lengths, data.truncated) == (2, [4, 3], 0)


def test_pairs_have_token_types(tokenizer):
    data = TokenDataset.tokenise(examples(["a"], ["b c"]), tokenizer, 16)
    assert data[0]["input_ids"] == [2, 5, 3, 6, 7, 3]
    assert data[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_long_texts_lose_their_end_and_are_counted(tokenizer, capfd):
    data = TokenDataset.tokenise(examples(["a b c a b c", "a", "c c c c"]), tokenizer, 5)
    assert data.columns["input_ids"] == [[2, 5, 6, 7, 3], [2, 5, 3], [2, 7, 7, 7, 3]]
    assert (data.truncated, data.lengths) == (2, [5, 3, 5])
    pairs = TokenDataset.tokenise(examples(["a b c a", "a"], ["b b b b", "b"]), tokenizer, 7)
    assert (pairs.truncated, pairs.lengths) == (1, [7, 5])
    assert capfd.readouterr() == ("", "")


def test_select_gives_the_rows_asked_for(tokenizer):
    data = TokenDataset.tokenise(examples(["a", "b b", "c c c"]), tokenizer, 16, [0, 1, 2])
    chosen = data.select([2, 0])
    assert [chosen[i] for i in range(2)] == [data[2], data[0]]
    assert chosen.lengths == [5, 3]


def test_batches_are_padded_to_a_multiple_of_eight(tokenizer):
    pad = PadBatch.of(tokenizer, 16)
    data = TokenDataset.tokenise(examples(["a", "a b c a b c a"]), tokenizer, 16, [1, 0])
    batch = pad([data[0], data[1]])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 16), "token_type_ids": (2, 16), "attention_mask": (2, 16), "labels": (2,),
    }  # fmt: skip
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["input_ids"][0].tolist() == [2, 5, 3] + [0] * 13


def test_padding_never_exceeds_what_the_model_takes(tokenizer):
    data = TokenDataset.tokenise(examples(["a b c a b c a b c a"]), tokenizer, 10)
    assert PadBatch.of(tokenizer, 10)([data[0]])["input_ids"].shape == (1, 10)


def test_regression_targets_become_floats(tokenizer):
    data = TokenDataset.tokenise(examples(["a"]), tokenizer, 16, [0.5])
    assert PadBatch.of(tokenizer, 16)([data[0]])["labels"].dtype == torch.float32


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    class NoPadding:
        pad_token_id = None

    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        PadBatch.of(NoPadding(), 16)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 5))
def test_buckets_hold_every_item_once(lengths, batch_size, seed):
    order = list(LengthBuckets(lengths, batch_size, seed))
    assert sorted(order) == list(range(len(lengths)))
    assert len(LengthBuckets(lengths, batch_size, seed)) == len(order)


def test_buckets_depend_on_seed_and_epoch_alone():
    buckets = LengthBuckets(list(range(100)), 8, seed=1)
    first = list(buckets)
    torch.rand(3)
    assert list(buckets) == first
    buckets.set_epoch(1)
    second = list(buckets)
    assert second != first
    other = LengthBuckets(list(range(100)), 8, seed=2)
    other.set_epoch(1)
    assert list(other) not in (first, second)
    buckets.set_epoch(0)
    assert list(buckets) == first


def test_buckets_pad_little_and_shuffle_the_batches():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (4000,), generator=generator).tolist()
    order = list(LengthBuckets(lengths, 16, seed=0))
    batches = [order[i : i + 16] for i in range(0, len(order), 16)]
    padded = sum(16 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)  # a random order pads to about 1.9 times
    longest = [max(lengths[i] for i in batch) for batch in batches[:50]]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
