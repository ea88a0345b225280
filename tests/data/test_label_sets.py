"""Several labels a row."""

from __future__ import annotations

import pytest

from tlfast.data import InputError, LabelSets, fit_label_sets, read_examples


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    return read_examples(path, empty_labels=True)


def test_labels_are_separated_by_bars_or_are_lists(tmp_path):
    table = read(tmp_path, "a.tsv", "text\tlabel\nx\tb|a\ny\t\nz\t a | a \n")
    lists = read(tmp_path, "a.jsonl", '{"text": "x", "label": ["b", "a"]}\n{"text": "y", "label": []}\n'
                 '{"text": "z", "label": "a"}\n')  # fmt: skip
    for examples in (table, lists):
        labels = fit_label_sets(examples)
        assert labels == LabelSets(("a", "b"))
        assert labels.encode(examples) == [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
        assert labels.num_labels == 2


def test_null_and_a_missing_label_mean_none(tmp_path):
    examples = read(
        tmp_path, "a.jsonl", '{"text": "x", "label": [2, 10]}\n{"text": "y", "label": null}\n{"text": "z"}\n'
    )
    labels = fit_label_sets(examples)
    assert labels.names == ("2", "10")
    assert labels.encode(examples) == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_bracket_in_a_table_is_a_name(tmp_path):
    assert fit_label_sets(read(tmp_path, "a.tsv", "text\tlabel\nx\t[a\n")).names == ("[a",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\nx\t\ny\t\n", r"a\.tsv: no row has a label; add rows that have some"),
        ("a.tsv", "text\tlabel\nx\ta\ny\ta||b\n", r"line 3: the label 'a\|\|b' has an empty part; write a\|b"),
        ("a.jsonl", '{"text": "x", "label": [["a"]]}\n', r"line 1: the label \[\[\"a\"\]\] is not a list of names"),
        ("a.jsonl", '{"text": "x", "label": "[a"}\n', r"line 1: the label \[a is not a list of names"),
        ("a.jsonl", '{"text": "x", "label": ["a", " "]}\n', r"line 1: the label .* has an empty part"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        fit_label_sets(read(tmp_path, name, content))


def test_a_label_that_is_not_in_training_is_named_with_its_line(tmp_path):
    with pytest.raises(InputError, match=r"a\.tsv, line 3: the label 'c' is not in the training data.* 'a', 'b'"):
        LabelSets(("a", "b")).encode(read(tmp_path, "a.tsv", "text\tlabel\nx\ta\ny\tb|c\n"))


def test_examples_without_labels_are_a_mistake_of_the_caller(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\nx\n")
    with pytest.raises(ValueError, match="read without labels") as caught:
        fit_label_sets(read_examples(path, label_column=None))
    assert not isinstance(caught.value, InputError)
