"""Running text: what is read, and how it is cut into blocks and prompts."""

from __future__ import annotations

import pytest

from tlfast.data import Documents, InputError, cut_blocks, read_documents, tokenise_prompts

pytest.importorskip("transformers")


class Letters:
    """A tokenizer for which every letter is a token, its place in the alphabet; "." closes where closing."""

    def __init__(self, eos_token_id=0, closing=False):
        self.eos_token_id = eos_token_id
        self.closing = closing

    def __call__(self, texts, truncation, verbose):
        return {"input_ids": [[ord(c) - 96 for c in text] + [0] * self.closing for text in texts]}


def documents(*texts):
    from pathlib import Path

    return Documents(Path("a.txt"), list(texts))


def test_a_text_file_is_one_document_and_a_table_one_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two\n")
    assert read_documents(tmp_path / "a.txt").texts == ["one\n\n two\n"]
    (tmp_path / "a.tsv").write_text("id\tbody\n1\tone\n2\ttwo\n")
    got = read_documents(tmp_path / "a.tsv", "body")
    assert (got.texts, len(got)) == (["one", "two"], 2)
    assert got.select([1]).texts == ["two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", r"a\.txt: the file is empty; it needs text"),
        ("a.txt", b"ab\ncd\xfe\n", r"a\.txt, line 2: not UTF-8 \(byte 0xfe at column 3\)"),
        ("a.tsv", b"txt\nab\n", r"a\.tsv: there is no column 'text'; it has 'txt'"),
        ("a.md", b"ab", r"a\.md: the extension '\.md' is not known; use one of \.txt, \.tsv, \.csv, \.jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / name)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_documents(tmp_path / "none.txt")


@pytest.mark.parametrize("closing", [False, True])
def test_documents_are_joined_by_one_end_and_cut_into_blocks(closing):
    got = cut_blocks(documents("abc", "de", "f"), Letters(closing=closing), 4)
    assert got.columns["input_ids"] == [[1, 2, 3, 0], [4, 5, 0, 6]]  # the last token, an end, predicts nothing
    assert got.columns["labels"] == got.columns["input_ids"]
    assert got.columns["attention_mask"] == [[1] * 4] * 2
    assert got.truncated == 0
    left = cut_blocks(documents("abc", "def"), Letters(closing=closing), 3)
    assert left.columns["input_ids"] == [[1, 2, 3], [0, 4, 5], [6, 0]]


def test_a_tokenizer_without_an_end_of_text_joins_documents_as_they_are():
    got = cut_blocks(documents("ab", "cd"), Letters(eos_token_id=None), 3)
    assert got.columns["input_ids"] == [[1, 2, 3]]


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match=r"a\.txt: 1 tokens are too few to predict one from another; add text"):
        cut_blocks(documents("a"), Letters(eos_token_id=None), 4)


def test_prompts_keep_their_last_tokens_and_no_end():
    got = tokenise_prompts(documents("abcdef", "ab"), Letters(closing=True), 4)
    assert got.columns["input_ids"] == [[3, 4, 5, 6], [1, 2]]
    assert got.columns["attention_mask"] == [[1] * 4, [1] * 2]
    assert (got.cut, got.truncated) == ((0,), 1)
