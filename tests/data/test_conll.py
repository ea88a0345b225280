"""CoNLL files: what is read, and that every complaint names the file, the line and the fix."""

from __future__ import annotations

import pytest

from tlfast.data import InputError, format_conll, read_conll


def write(tmp_path, content):
    path = tmp_path / "a.conll"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "EU B-ORG\nrejects O\n\nPeter B-PER\n",
        "\ufeff-DOCSTART- O\r\n\r\nEU B-ORG\r\nrejects O\r\n\r\n\r\nPeter B-PER\r\n\r\n",
        "# a comment\nEU\tB-ORG\nrejects\tO\n-DOCSTART- O\nPeter\tB-PER",
        "\n\nEU  B-ORG\nrejects O\n \n# id = 2\n# text = Peter\nPeter B-PER\n",
    ],
)
def test_the_forms_of_the_format_give_the_same_sentences(tmp_path, content):
    got = read_conll(write(tmp_path, content))
    assert got.words == [["EU", "rejects"], ["Peter"]]
    assert got.tags == [["B-ORG", "O"], ["B-PER"]]
    assert len(got) == 2


def test_columns_are_chosen_and_lines_counted(tmp_path):
    path = write(tmp_path, "1 EU NNP B-ORG\n2 rejects VBZ O\n\n1 Peter NNP B-PER\n")
    assert read_conll(path, token_column=1).tags == [["B-ORG", "O"], ["B-PER"]]
    got = read_conll(path, token_column=1, tag_column=-2)
    assert (got.words[0], got.tags[0], got.lines) == (["EU", "rejects"], ["NNP", "VBZ"], [[1, 2], [4]])
    assert read_conll(path, 1, None).tags is None
    assert read_conll(path, 1, 3).select([1]).tags == [["B-PER"]]


def test_words_are_enough_where_tags_are_not_read(tmp_path):
    got = read_conll(write(tmp_path, "EU\nrejects\n\nPeter\n"), tag_column=None)
    assert (got.words, got.tags) == ([["EU", "rejects"], ["Peter"]], None)


def test_tabs_leave_blanks_in_words_and_a_hash_within_a_sentence_is_a_word(tmp_path):
    got = read_conll(write(tmp_path, "New York\tB-LOC\n#\tO\n\nNo O\n# O\n1\u00a0000 O\n"))
    assert got.words == [["New York", "#"], ["No", "#", "1\u00a0000"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.conll: the file is empty; it needs one word a line"),
        ("\n \n", r"a\.conll: the file is empty"),
        ("# nothing\n-DOCSTART- O\n", r"a\.conll: the file has no words; add sentences"),
        ("EU B-ORG\nrejects\n", r"a\.conll, line 2: 1 columns where the lines before have 2; give every word the same"),
        ("EU B-ORG\n\nre jects O\n", r"a\.conll, line 3: 3 columns where the lines before have 2"),
        ("EU\nrejects\n", r"a\.conll, line 1: column 0 of 1 would be both token and tag; add the missing column"),
        ("EU\tB-ORG\nrejects\t\n", r"a\.conll, line 2: column -1 is empty; fill it or remove the line"),
        (b"EU O\nr\xff O\n", r"a\.conll, line 2: not UTF-8 \(byte 0xff at column 2\); convert"),
    ],
)
def test_bad_files_are_refused_with_line_and_fix(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_conll(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there_are_refused(tmp_path):
    path = write(tmp_path, "\nEU B-ORG\n")
    with pytest.raises(InputError, match=r"line 2: there is no tag column 3; the line has 2, counted from 0"):
        read_conll(path, tag_column=3)
    with pytest.raises(InputError, match=r"line 2: there is no token column -3; the line has 2"):
        read_conll(path, token_column=-3)
    with pytest.raises(InputError, match=r"column 1 of 2 would be both token and tag"):
        read_conll(path, token_column=1)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file; check the path"):
        read_conll(tmp_path / "none.conll")
    with pytest.raises(InputError, match="this is a folder; pass a file"):
        read_conll(tmp_path)


def test_what_is_written_is_read_back(tmp_path):
    rows = [{"tokens": ["New York", "#"], "tags": ["B-LOC", "O"]}, {"tokens": ["x"], "tags": ["O"]}]
    got = read_conll(write(tmp_path, format_conll(rows)))
    assert [{"tokens": words, "tags": tags} for words, tags in zip(got.words, got.tags, strict=True)] == rows
