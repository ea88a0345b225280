"""Readers: what they accept, and that every complaint names the file, the line and the fix."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlfast.data import InputError, format_rows, read_examples


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "text\tlabel\ngood film\t1\nbad , film\t0\n"),
        ("a.TSV", "\ufefflabel\ttext\r\n1\tgood film\r\n0\tbad , film\r\n\r\n"),
        ("a.csv", 'id,text,label\n7,good film,1\n8,"bad , film",0\n'),
        ("a.jsonl", '{"text": "good film", "label": 1}\n{"label": "0", "text": "bad , film", "x": [1]}\n'),
    ],
)
def test_the_formats_give_the_same_examples(tmp_path, name, content):
    got = read_examples(write(tmp_path, name, content))
    assert got.texts == ["good film", "bad , film"]
    assert got.labels == ["1", "0"]
    assert got.pairs is None
    assert got.lines == ([1, 2] if name.endswith("jsonl") else [2, 3])
    assert len(got) == 2


def test_tsv_takes_quotes_and_odd_separators_as_text(tmp_path):
    texts = ['"stray', "it 's \"", "a\u0085b\u2028c", "x\x0cy"]
    path = write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    assert read_examples(path).texts == texts


def test_csv_takes_quotes_as_quotes_over_several_lines(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"say ""hi""\nthere",1\nplain,0\n')
    got = read_examples(path)
    assert got.texts == ['say "hi"\nthere', "plain"]
    assert got.lines == [2, 4]


def test_csv_takes_long_fields_and_leaves_the_limit_of_csv_alone(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path, "a.csv", f"text,label\n{'word ' * 40_000},1\n")
    assert len(read_examples(path).texts[0]) == 200_000
    assert csv.field_size_limit() == limit


def test_pairs_and_other_column_names(tmp_path):
    path = write(tmp_path, "a.tsv", "s1\ts2\tgold\na\tb\t1\n")
    got = read_examples(path, "s1", "gold", pair_column="s2")
    assert (got.texts, got.pairs, got.labels) == (["a"], ["b"], ["1"])
    assert read_examples(path, "s1", "gold", pair_column="s2", pairs=False).pairs is None
    assert read_examples(path, "s2", None).labels is None
    with pytest.raises(InputError, match="no column 'text_pair'; it has 's1', 's2', 'gold'"):
        read_examples(path, "s1", "gold", pairs=True)


def test_select_keeps_rows_together(tmp_path):
    path = write(tmp_path, "a.tsv", "text\ttext_pair\tlabel\na\tA\t1\nb\tB\t2\nc\tC\t3\n")
    got = read_examples(path).select([2, 0])
    assert (got.texts, got.pairs, got.labels, got.lines) == (["c", "a"], ["C", "A"], ["3", "1"], [4, 2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text\n", r"a\.txt: the extension '\.txt' is not known; use one of \.tsv, \.csv, \.jsonl"),
        ("a.tsv", "", r"a\.tsv: the file is empty"),
        ("a.tsv", "\n\n", r"a\.tsv: the file is empty"),
        ("a.tsv", "text\tlabel\n", r"a\.tsv: the file has a header and no rows"),
        ("a.tsv", "txt\tlabel\na\t1\n", r"a\.tsv: there is no column 'text'; it has 'txt', 'label'"),
        ("a.csv", "text;label\na;1\n", r"a\.csv: there is no column 'text'; it has 'text;label'"),
        ("a.jsonl", '{"txt": "a"}\n', r"a\.jsonl: there is no column 'text'; it has 'txt'"),
        ("a.tsv", "text\ttext\tlabel\na\tb\t1\n", r"the column 'text' is there 2 times; keep one"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", r"a\.tsv, line 3: 1 fields where the header has 2"),
        ("a.tsv", "text\tlabel\na\tb\t1\n", r"a\.tsv, line 2: 3 fields where the header has 2"),
        ("a.csv", "text,label\na,1\n\nb,0\n", r"a\.csv, line 3: 0 fields where the header has 2"),
        ("a.tsv", "text\tlabel\n \t1\n", r"a\.tsv, line 2: the column 'text' is empty"),
        ("a.tsv", "text\tlabel\na\t \n", r"a\.tsv, line 2: the column 'label' is empty"),
        ("a.tsv", "text\ttext_pair\tlabel\na\t\t1\n", r"a\.tsv, line 2: the column 'text_pair' is empty"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"a\.jsonl, line 2: the column 'label' is empty"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"a\.jsonl, line 1: the column 'label' is empty"),
        ("a.tsv", b"text\tlabel\nab\xff\t1\n", r"a\.tsv, line 2: not UTF-8 \(byte 0xff at column 3\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', r"a\.jsonl, line 2: malformed JSON \(.* at column 8\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"}\n', r"a\.jsonl, line 2: malformed JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: a JSON list; write one object a line"),
        ("a.csv", 'text,label\na,1\n"b,0\n', r"a\.csv, line 3: malformed CSV"),
        ("a.csv", 'text,label\n"a"b,1\n', r"a\.csv, line 2: malformed CSV"),
    ],
)
def test_bad_files_are_refused_with_line_and_fix(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_examples(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value) or "Rename" in str(caught.value)  # what is wrong, then how to fix it


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.tsv: there is no such file; check the path"):
        read_examples(tmp_path / "none.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(InputError, match="this is a folder; pass a file"):
        read_examples(tmp_path / "folder.tsv")


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t\0"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(FIELD, FIELD), min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": text, "label": label} for text, label in pairs]
    for suffix in (".tsv", ".csv", ".jsonl"):
        path = write(folder, f"a{suffix}", format_rows(rows, suffix))
        got = read_examples(path)
        assert got.texts == [text for text, _ in pairs]
        assert got.labels == [label.strip() for _, label in pairs]


def test_tsv_refuses_what_it_cannot_hold():
    with pytest.raises(InputError, match="has a tab or a line end"):
        format_rows([{"prediction": "a\tb"}], ".tsv")
    assert format_rows([{"prediction": "a\tb", "n": 1}], ".csv") == "prediction,n\na\tb,1\n"
    assert json.loads(format_rows([{"prediction": "a\tb"}], ".jsonl")) == {"prediction": "a\tb"}
