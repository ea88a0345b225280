"""What the transfer benchmarks read: bytes in blocks, prose split by file, letters drawn from fonts."""

from itertools import chain

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from benchmarks import letters, pretrain


def test_blocks_hold_the_documents_and_an_end_behind_each():
    documents = [bytes(range(200)), b"x" * 200, b"left over"]
    data = pretrain.blocks(documents)
    assert data["input_ids"].shape == (1, pretrain.CONTEXT)
    expected = [*range(200), pretrain.END, *b"x" * 55]
    assert data["input_ids"][0].tolist() == data["labels"][0].tolist() == expected
    many = [bytes(300)] * 10
    assert pretrain.blocks(many)["input_ids"].shape == (11, pretrain.CONTEXT)
    assert torch.equal(pretrain.blocks(many, most=3)["input_ids"], pretrain.blocks(many)["input_ids"][:3])


def test_prose_is_split_by_file_and_no_text_is_in_two_splits(tmp_path, monkeypatch):
    for index in range(6):
        body = f'"""What file number {index} says about itself in these many words, all of them plain."""\n'
        shared = '\ndef f():\n    """One sentence that every single file has, word for word, more than once."""\n'
        (tmp_path / f"m{index}.py").write_text(body + shared)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "m.py").write_text('"""Nobody reads what the tests of a package have to say here."""')
    monkeypatch.setattr(pretrain, "package_roots", lambda: {"torch": tmp_path})
    splits = pretrain.torch_prose((1, 2, 3))
    assert [len(texts) for texts in splits] == [2, 2, 3]  # the shared sentence only where it was met first
    texts = [*chain(*splits)]
    assert len(set(texts)) == len(texts)
    assert not any(b"tests of a package" in text for text in texts)
    assert pretrain.torch_prose((1, 2, 3)) == splits


def test_letters_are_drawn_alike_for_a_seed_and_differ_within_a_class():
    data = letters.draw(400)
    images, labels = data["pixel_values"], data["labels"]
    assert images.shape == (400, 1, letters.SIZE, letters.SIZE)
    assert images.min() >= -1 and images.max() <= 1
    assert images.amax((1, 2, 3)).min() > 0.9, "an image is empty"
    assert set(labels.tolist()) == set(range(len(letters.LETTERS)))
    assert torch.equal(letters.draw(400)["pixel_values"], images)
    assert not torch.equal(letters.draw(400, seed=1)["pixel_values"], images)
    first = images[labels == 0]
    assert (first[0] != first[1]).any()
