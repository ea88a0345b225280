"""Bad input to tlfast ladder, by task: status 2, one line that says what and how to fix it, nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from .ladder_runs import BAD, GOOD, NEUTRAL, refused, run, save_backbone, train, write_sentences
from .task_runs import (
    NUMBERS,
    save_gpt2,
    save_t5,
    save_vit,
    words_tokenizer,
    write_colours,
    write_conll,
    write_counting,
    write_successors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_EPOCH = ("--epochs", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Backbones, and a file or folder for each task."""
    folder = tmp_path_factory.mktemp("data")
    save_backbone(folder / "bert")
    save_gpt2(folder / "gpt2")
    save_t5(folder / "t5")
    save_vit(folder / "vit")
    write_sentences(folder / "texts.tsv", 40, 0)
    write_conll(folder / "tags.conll", 40, 0, GOOD, BAD, NEUTRAL)
    write_colours(folder / "colours", 24, 0)
    write_counting(folder / "counting.tsv", 60, 0)
    write_successors(folder / "successors.tsv", 40, 0)
    return folder


FILES = {
    "sequence-classification": ("bert", "texts.tsv"),
    "token-classification": ("bert", "tags.conll"),
    "image-classification": ("vit", "colours"),
    "causal-lm": ("gpt2", "counting.tsv"),
    "seq2seq-lm": ("t5", "successors.tsv"),
}


def train_task(data, task, out, *more, backbone=None, test=None, **files):
    """One epoch of a task; later options win."""
    own_backbone, file = FILES[task]
    given = [word for name, path in files.items() for word in (f"--{name}", path)]
    test = data / file if test is None else test
    return train(data / (backbone or own_backbone), data / file, test, out, "--task", task, *ONE_EPOCH, *given, *more)


@pytest.fixture(scope="module")
def trained(data):
    """task -> a finished run; trained when first asked for."""

    def get(task):
        out = data / f"run-{task}"
        if not out.exists():
            assert train_task(data, task, out).exit_code == 0
        return out

    return get


def test_an_unknown_task(data, tmp_path):
    result = train(data / "bert", data / "texts.tsv", data / "texts.tsv", tmp_path / "run", "--task", "chess")
    refused(result, "--task 'chess': is not available; choose one of sequence-classification, token-classification")


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        ("image-classification", "--text-column", "text"),
        ("token-classification", "--label-column", "tag"),
        ("causal-lm", "--label-column", "label"),
        ("seq2seq-lm", "--pair-column", "b"),
        ("sequence-classification", "--block-size", 8),
        ("sequence-classification", "--tag-column", 1),
        ("seq2seq-lm", "--token-column", 1),
    ],
)
def test_options_of_other_tasks(data, tmp_path, task, option, value):
    refused(train_task(data, task, tmp_path / "run", option, value), f"{option}: means nothing for {task}; leave it")
    assert not (tmp_path / "run").exists()


def test_switches_of_other_tasks(data, tmp_path, trained):
    result = train_task(data, "causal-lm", tmp_path / "run", "--multi-label")
    refused(result, "--multi-label: means nothing for causal-lm")
    model = trained("sequence-classification")
    result = run("predict", "--model", model, "--data", data / "texts.tsv", "--max-new-tokens", 3)
    refused(result, "--max-new-tokens: means nothing for sequence-classification; leave it out")


@pytest.mark.parametrize(
    ("task", "backbone", "message"),
    [
        ("sequence-classification", "t5", "does not fit this t5 backbone: an encoder-decoder takes seq2seq-lm"),
        ("sequence-classification", "vit", "cannot be loaded"),  # it has no tokenizer
        ("sequence-classification", "gpt2", "it has no padding token"),
        ("image-classification", "bert", "cannot be loaded"),  # it has no image processor
        ("causal-lm", "bert", "cannot be loaded (its files lack"),  # it has no head
        ("seq2seq-lm", "bert", "cannot be loaded (Unrecognized configuration class"),
        ("seq2seq-lm", "gpt2", "for this kind of AutoModel: AutoModelForSeq2SeqLM.); pass another"),
    ],
)
def test_backbones_of_other_tasks(data, tmp_path, task, backbone, message):
    result = train_task(data, task, tmp_path / "run", backbone=backbone)
    refused(result, message)
    assert len(result.stderr) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "option", "value", "message"),
    [
        ("causal-lm", "--block-size", 1, "--block-size 1: pass 2 to 32, the model's greatest length"),
        ("causal-lm", "--block-size", 33, "--block-size 33: pass 2 to 32"),
        ("token-classification", "--tag-column", 7, "line 1: there is no tag column 7; the line has 2, counted from 0"),
        ("token-classification", "--token-column", 1, "would be both token and tag"),
        ("sequence-classification", "--decoder-layers", "0", "decoder_layers: this bert backbone has one list of"),
        ("seq2seq-lm", "--decoder-layers", "top", "--decoder-layers 'top': pass \"all\" or block indices"),
        ("seq2seq-lm", "--decoder-layers", "5", "decoder_layers"),
        ("seq2seq-lm", "--label-column", "answer", "there is no column 'answer'; it has 'text', 'label'"),
    ],
)
def test_bad_settings(data, tmp_path, task, option, value, message):
    refused(train_task(data, task, tmp_path / "run", option, value), message)
    assert not (tmp_path / "run").exists()


# files


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("good B-PER\nfilm\n", "line 2: 1 columns where the lines before have 2; give every word"),
        ("good O\nfilm O\n" * 12, "every word has the tag 'O'; add words"),
        ("good B-PER\nfilm O\n", "1 sentences are too few to split a dev set off; pass a dev file"),
        ("", "the file is empty; it needs one word a line"),
    ],
)
def test_bad_conll_files(data, tmp_path, rows, message):
    (tmp_path / "bad.conll").write_text(rows)
    result = train(
        data / "bert", tmp_path / "bad.conll", data / "tags.conll", tmp_path / "run", "--task", "token-classification"
    )
    refused(result, f"{tmp_path / 'bad.conll'}", message)
    assert not (tmp_path / "run").exists()


def test_a_tag_that_is_not_in_training_costs_no_training(data, tmp_path):
    (tmp_path / "test.conll").write_text("good B-PER\nfilm B-LOC\n")
    out = tmp_path / "run"
    result = train_task(data, "token-classification", out, "--json", test=tmp_path / "test.conll")
    refused(result, "line 2: the tag 'B-LOC' is not in the training data, which has 'B-PER'", "add --resume")
    assert sorted(entry.name for entry in out.iterdir()) == ["checkpoints", "run.json"]
    result = train_task(data, "token-classification", tmp_path / "other", dev=tmp_path / "test.conll")
    refused(result, "line 2: the tag 'B-LOC' is not in the training data")
    assert not (tmp_path / "other").exists()


def test_bad_folders_of_images(data, tmp_path):
    result = train_task(data, "image-classification", tmp_path / "run", test=tmp_path / "none")
    refused(result, f"{tmp_path / 'none'}: there is no such folder; check the path")
    result = train_task(data, "image-classification", tmp_path / "run", test=data / "texts.tsv")
    refused(result, "texts.tsv: there is no such folder")
    folder = shutil.copytree(data / "colours", tmp_path / "colours")
    (folder / "red" / "001.png").write_bytes(b"no image")
    refused(train_task(data, "image-classification", tmp_path / "run", train=folder), "001.png: the image is broken")
    assert not (tmp_path / "run").exists()


def test_an_image_whose_end_is_missing(data, tmp_path):
    folder = shutil.copytree(data / "colours", tmp_path / "colours")
    path = folder / "red" / "001.png"
    path.write_bytes(path.read_bytes()[:200])
    result = train_task(data, "image-classification", tmp_path / "run", "--json", train=folder)
    refused(result, f"{path}: the image is broken", "replace or remove it")
    assert not (tmp_path / "run").exists()


def test_too_little_running_text(data, tmp_path):
    (tmp_path / "short.txt").write_text("1 2 3 4 5 6 7\n")
    result = train_task(data, "causal-lm", tmp_path / "run", "--block-size", 2, train=tmp_path / "short.txt")
    refused(result, "4 blocks of 2 tokens are too few to split a dev set off; pass a dev file or a smaller --block")
    (tmp_path / "empty.txt").write_text("\n")
    refused(train_task(data, "causal-lm", tmp_path / "run", train=tmp_path / "empty.txt"), "it needs text")


def test_a_pair_without_a_target(data, tmp_path):
    (tmp_path / "bad.tsv").write_text("text\tlabel\n1\t2\n2\t\n")
    result = train_task(data, "seq2seq-lm", tmp_path / "run", train=tmp_path / "bad.tsv")
    refused(result, "line 3: the column 'label' is empty; fill it or remove the row")


def test_sets_of_labels_that_are_none(data, tmp_path):
    (tmp_path / "bad.tsv").write_text("text\tlabel\n" + "good film\ta||b\n" * 12)
    result = train_task(data, "sequence-classification", tmp_path / "run", "--multi-label", train=tmp_path / "bad.tsv")
    refused(result, "line 2: the label 'a||b' has an empty part")


def test_a_tokenizer_with_nothing_to_pad_with(data, tmp_path):
    folder = shutil.copytree(data / "gpt2", tmp_path / "gpt2")
    words_tokenizer(NUMBERS, {"unk_token": "<unk>"}).save_pretrained(folder)
    result = train_task(data, "causal-lm", tmp_path / "run", backbone=folder)
    refused(result, "neither a padding token nor an end of text; add one of them")


# predictions


@pytest.mark.parametrize(
    ("task", "name", "allowed"),
    [
        ("token-classification", "p.csv", ".conll, .tsv, .txt, .jsonl"),
        ("causal-lm", "p.txt", ".jsonl, .csv, .tsv"),
        ("image-classification", "p.conll", ".tsv, .csv, .jsonl"),
    ],
)
def test_files_of_predictions_that_are_not_written(data, trained, tmp_path, task, name, allowed):
    result = run("predict", "--model", trained(task), "--data", data / FILES[task][1], "--out", tmp_path / name)
    refused(result, f"is not known; use one of {allowed}")


@pytest.mark.parametrize(("task", "most"), [("causal-lm", 31), ("seq2seq-lm", 23)])
@pytest.mark.parametrize("count", [0, "most + 1"])
def test_texts_of_a_length_that_cannot_be_written(data, trained, task, most, count):
    count = most + 1 if count else 0
    path = data / FILES[task][1]
    result = run("predict", "--model", trained(task), "--data", path, "--max-new-tokens", count)
    refused(result, f"--max-new-tokens {count}: pass 1 to {most}; the model takes {most + 1} tokens")


def test_a_folder_of_classes_is_not_predicted(data, trained):
    result = run("predict", "--model", trained("image-classification"), "--data", data / "colours")
    refused(result, "is a folder among images; move its images up or remove it")


def test_a_task_that_is_not_known(trained, data, tmp_path):
    model = shutil.copytree(trained("sequence-classification"), tmp_path / "model")
    task = json.loads((model / "task.json").read_text())
    (model / "task.json").write_text(json.dumps({**task, "task": "chess"}))
    refused(run("eval", "--model", model, "--data", data / "texts.tsv"), f"{model / 'task.json'}: the file is damaged")


def test_a_run_of_the_first_version_is_read(trained, data, tmp_path):
    model = shutil.copytree(trained("sequence-classification"), tmp_path / "model")
    task = json.loads((model / "task.json").read_text())
    first = {name: task[name] for name in ("labels", "columns", "pairs", "max_length", "backbone")}
    (model / "task.json").write_text(json.dumps(first))
    result = run("eval", "--model", model, "--data", data / "texts.tsv", "--json")
    assert json.loads(result.stdout) == json.loads((model / "metrics.json").read_text())["test"]
