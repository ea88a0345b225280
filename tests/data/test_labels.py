"""Labels: what the task is, decided by the training data, and the stratified dev split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tlfast.data import Examples, InputError, Labels, fit_labels, split_dev


def examples(labels, name="train.tsv"):
    lines = list(range(2, len(labels) + 2))
    return Examples(Path(name), [f"text {i}" for i in lines], None, [str(label) for label in labels], lines)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([10, 9, 2], ("2", "9", "10")),  # by value, not as strings
        (["01", "+2", "-3"], ("-3", "1", "2")),
        (["1", "a"], ("1", "a")),
        (["1_0", "2.5"], ("1_0", "2.5")),  # float("1_0") is 10, but not in a file
    ],
)
def test_classes_are_sorted_and_do_not_depend_on_the_order_of_rows(labels, names):
    assert fit_labels(examples(labels)) == Labels(names)
    assert fit_labels(examples(labels[::-1])) == Labels(names)


def test_classes_are_encoded_by_their_place():
    labels = fit_labels(examples(["b", "a", "c"]))
    assert labels.encode(examples(["c", "a", "b"])) == [2, 0, 1]
    assert (labels.num_labels, labels.regression) == (3, False)
    assert fit_labels(examples([1, 2])).encode(examples(["02", "+1"])) == [1, 0]


def test_fractional_numbers_make_a_regression():
    labels = fit_labels(examples(["1.0", "2", "3e-1"]))
    assert (labels.num_labels, labels.regression) == (1, True)
    assert labels.encode(examples(["2", "0.5"])) == [2.0, 0.5]


def test_a_label_that_is_not_in_training_is_named_with_its_line():
    labels = fit_labels(examples(["a", "b"]))
    with pytest.raises(InputError, match=r"dev\.tsv, line 3: the label 'c' is not in the training data.* 'a', 'b'"):
        labels.encode(examples(["a", "c"], "dev.tsv"))
    many = Labels(tuple(map(str, range(30))))
    with pytest.raises(InputError, match=r"'9' and 20 more; correct it"):
        many.encode(examples(["x"]))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_targets_that_are_not_finite_are_named_with_their_line(value):
    with pytest.raises(InputError, match=rf"train\.tsv, line 4: the label is {value}; give a finite number"):
        fit_labels(examples(["1.5", "2.5", value]))
    with pytest.raises(InputError, match=rf"dev\.tsv, line 2: the label is {value}"):
        Labels(()).encode(examples([value], "dev.tsv"))


def test_words_among_regression_targets_are_refused():
    with pytest.raises(InputError, match=r"dev\.tsv, line 2: the label 'good' is not a number"):
        Labels(()).encode(examples(["good"], "dev.tsv"))


@pytest.mark.parametrize("labels", [["a"] * 3, ["1", "01"], ["2.5"] * 3])
def test_a_single_class_or_target_is_refused(labels):
    with pytest.raises(InputError, match=r"every row has the label .*; add rows with at least one other label"):
        fit_labels(examples(labels))


def test_examples_without_labels_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="read without labels") as caught:
        fit_labels(Examples(Path("a.tsv"), ["x"], None, None, [2]))
    assert not isinstance(caught.value, InputError)


def test_the_dev_split_is_a_stratified_tenth():
    train = examples(["a"] * 200 + ["b"] * 100 + ["c"] * 53)
    rest, dev = split_dev(train, seed=3)
    assert Counter(dev.labels) == {"a": 20, "b": 10, "c": 5}
    assert sorted(rest.lines + dev.lines) == train.lines
    assert split_dev(train, seed=3)[1].lines == dev.lines
    assert split_dev(train, seed=4)[1].lines != dev.lines


def test_every_class_stays_in_training():
    train = examples(["a"] * 10 + [f"rare {i}" for i in range(15)])
    rest, dev = split_dev(train, seed=0)
    assert set(rest.labels) == set(train.labels)
    assert len(dev) >= 1


def test_the_dev_split_of_a_regression_covers_the_range():
    train = examples([i + 0.5 for i in range(100)])
    _, dev = split_dev(train, seed=0)
    assert [int(float(label)) // 10 for label in sorted(dev.labels, key=float)] == list(range(10))


def test_too_little_data_to_split_is_refused():
    with pytest.raises(InputError, match="9 rows are too few to split a dev set off; pass a dev file"):
        split_dev(examples(["a", "b", "b"] * 3), seed=0)
    with pytest.raises(InputError, match="only one of its class; pass a dev file"):
        split_dev(examples(range(12)), seed=0)
