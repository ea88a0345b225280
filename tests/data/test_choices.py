"""Questions with several answers: what is read, how answers are marked and padded, and what is refused."""

import pytest
import torch

from tlfast.data import ChoiceDataset, InputError, PadBatch, PadChoices, read_choices

transformers = pytest.importorskip("transformers")
PAD, CLS, SEP, A, B = 0, 2, 3, 5, 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    return transformers.BertTokenizer(str(path))


def written(tmp_path, text, name="a.tsv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_answers_stand_behind_their_question_and_are_marked(tokenizer, tmp_path):
    path = written(tmp_path, "text\tchoice_0\tchoice_1\tlabel\na b\ta\tb b\t1\nb\tb\ta\t0\n")
    found = read_choices(path)
    assert found.choices == [("a", "b b"), ("b", "a")] and found.labels == [1, 0] and found.lines == [2, 3]
    data = ChoiceDataset.tokenise(found, tokenizer, 16)
    assert data[0]["input_ids"] == [[CLS, A, B, SEP, A, SEP], [CLS, A, B, SEP, B, B, SEP]]
    assert data[0]["answers"] == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0]]
    assert data[0]["token_type_ids"] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]]
    assert data.labels == [1, 0] and data.lengths == [7, 5] and data.truncated == 0
    batch = PadChoices(PadBatch.of(tokenizer, 16))([data[0], data[1]])
    assert batch["input_ids"].shape == (2, 2, 8) and batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"][1, 0].tolist() == [CLS, B, SEP, B, SEP, PAD, PAD, PAD]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    assert batch["answers"].sum().item() == 5 and (batch["answers"] <= batch["attention_mask"]).all()


def test_what_is_too_long_loses_the_end_of_its_question_alone(tokenizer, tmp_path):
    found = read_choices(written(tmp_path, "text\tchoice_0\tchoice_1\na b b b\ta\tb a\nb\tb\ta\n"), label_column=None)
    data = ChoiceDataset.tokenise(found, tokenizer, 7)
    assert data[0]["input_ids"] == [[CLS, A, B, B, SEP, A, SEP], [CLS, A, B, SEP, B, A, SEP]]
    assert data[0]["answers"] == [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0]]
    assert data.truncated == 1 and data.cut == (0,) and "labels" not in data.columns
    assert data.select([1]).columns["input_ids"] == [data[1]["input_ids"]]
    with pytest.raises(InputError, match=r"a\.tsv, line 2: an answer leaves no token of 5 for its question"):
        ChoiceDataset.tokenise(found, tokenizer, 5)


def test_jsonl_and_any_number_of_choices(tmp_path):
    line = '{"q": "a", "choice_2": "z", "choice_0": "x", "choice_1": "y", "right": 2}\n'
    found = read_choices(written(tmp_path, line, "a.jsonl"), "q", "right")
    assert found.choices == [("x", "y", "z")] and found.labels == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tchoice_0\tlabel\na\tb\t0\n", "there is no column 'choice_1'"),
        ("text\tchoice_0\tchoice_2\tlabel\na\tb\tc\t0\n", "there is no column 'choice_1'"),
        ("text\tchoice_0\tchoice_1\na\tb\tc\n", "there is no column 'label'"),
        ("text\tchoice_0\tchoice_1\tlabel\na\tb\tc\t2\n", "line 2: the label '2' is not the number of a choice"),
        ("text\tchoice_0\tchoice_1\tlabel\na\tb\tc\tb\n", "write 0 to 1"),
        ("text\tchoice_0\tchoice_1\tlabel\na\tb\t\t0\n", "line 2: the column 'choice_1' is empty"),
        ("text\tchoice_0\tchoice_1\tlabel\n", "a header and no rows"),
    ],
)
def test_refusals(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_choices(written(tmp_path, text))
