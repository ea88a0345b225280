"""tlfast ladder for every task, from the command line, on tiny backbones."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tlfast.data import read_conll
from tlfast.ladder import LadderModel

from .ladder_runs import BAD, GOOD, NEUTRAL, metrics, run, save_backbone, train, write_moods
from .task_runs import (
    save_gpt2,
    save_t5,
    save_vit,
    write_colours,
    write_conll,
    write_counting,
    write_successors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TAGS, IMAGES, CAUSAL, SEQ2SEQ, SETS = (
    "token-classification", "image-classification", "causal-lm", "seq2seq-lm", "multi-label",
)  # fmt: skip
OPTIONS = {
    TAGS: ("--task", TAGS),
    IMAGES: ("--task", IMAGES, "--lr", "5e-3"),
    CAUSAL: ("--task", CAUSAL, "--block-size", 16, "--epochs", 4),
    SEQ2SEQ: ("--task", SEQ2SEQ, "--decoder-layers", "0,1", "--layers", "1"),
    SETS: ("--multi-label", "--epochs", 4),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """task -> backbone, training and test data."""
    folder = tmp_path_factory.mktemp("data")
    bert = save_backbone(folder / "bert")

    def both(write, name, train_count, test_count, *more):
        train_name, test_name = (f"{part}-{name}" for part in ("train", "test"))
        return write(folder / train_name, train_count, 0, *more), write(folder / test_name, test_count, 1, *more)

    return {
        TAGS: (bert, *both(write_conll, "tags.conll", 150, 30, GOOD, BAD, NEUTRAL)),
        IMAGES: (save_vit(folder / "vit"), *both(write_colours, "colours", 60, 20)),
        CAUSAL: (save_gpt2(folder / "gpt2"), *both(write_counting, "counting.tsv", 150, 30)),
        SEQ2SEQ: (save_t5(folder / "t5"), *both(write_successors, "successors.tsv", 200, 30)),
        SETS: (bert, *both(write_moods, "moods.tsv", 200, 60)),
    }


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """task -> a finished run; trained when first asked for."""
    runs: dict[str, Path] = {}

    def get(task):
        if task not in runs:
            out = tmp_path_factory.mktemp("run") / task
            result = train(*data[task], out, *OPTIONS[task], "--json")
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout) == metrics(out)
            assert result.stderr == ""
            runs[task] = out
        return runs[task]

    return get


@pytest.mark.parametrize("task", OPTIONS)
def test_metrics_json_has_what_is_promised(trained, task):
    got = metrics(trained(task))
    assert got["accuracy"] == got["test"]["accuracy"]
    for part in ("train", "dev", "test"):
        assert 0 <= got[part]["accuracy"] <= 1
        assert got[part]["n"] == got["examples"][part]
    assert got["seconds_per_epoch"] > 0
    assert got["saved_bytes_per_sample"] > 0
    assert got["saved_bytes_batch"]["samples"] == 8
    assert got["peak_memory_bytes"] > 2**20
    assert got["versions"]["torch"]
    assert got["machine"]["cores"] >= 1
    assert got["settings"]["task"] == (task if task != SETS else "sequence-classification")


def test_the_commands_learn(trained):
    scores = {task: metrics(trained(task))["test"] for task in OPTIONS}
    assert scores[TAGS]["f1"] > 0.8
    assert scores[IMAGES]["accuracy"] >= 0.8  # half are of each class
    assert scores[CAUSAL]["accuracy"] > 0.5  # of ten digits
    assert scores[SEQ2SEQ]["accuracy"] > 0.4
    assert scores[SETS]["micro_f1"] > 0.75
    assert {task: metrics(trained(task))["selected_by"] for task in OPTIONS} == {
        TAGS: "dev f1", IMAGES: "dev accuracy", CAUSAL: "dev loss", SEQ2SEQ: "dev loss", SETS: "dev micro_f1",
    }  # fmt: skip
    assert set(scores[SEQ2SEQ]) == {"loss", "perplexity", "accuracy", "tokens", "exact_match", "n"}
    assert "exact_match" not in metrics(trained(SEQ2SEQ))["dev"]


@pytest.mark.parametrize("task", OPTIONS)
def test_a_run_leaves_its_files_and_checkpoints_without_backbone_weights(data, trained, task):
    out = trained(task)
    preprocessor = "image_processor" if task == IMAGES else "tokenizer"
    names = ["checkpoints", "config.json", "curve.png", "metrics.json", "model.safetensors", "run.json", "task.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, preprocessor])
    kind = {CAUSAL: AutoModelForCausalLM, SEQ2SEQ: AutoModelForSeq2SeqLM}.get(task, AutoModel)
    model = LadderModel.from_pretrained(out, backbone=kind.from_pretrained(data[task][0]))
    checkpoints = list((out / "checkpoints").glob("checkpoint-*/model.safetensors"))
    assert checkpoints
    for path in checkpoints:
        saved = load_file(path)
        assert saved.keys() == model.state_dict().keys()
        trained_numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(tensor.numel() for tensor in saved.values()) < 1.1 * trained_numbers + 100


@pytest.mark.parametrize("task", OPTIONS)
def test_eval_gives_the_test_scores_of_training(data, trained, task):
    result = run("eval", "--model", trained(task), "--data", data[task][2], "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == metrics(trained(task))["test"]
    assert result.stderr == ""
    plain = run("eval", "--model", trained(task), "--data", data[task][2])
    assert f"accuracy {metrics(trained(task))['accuracy']:.4f}" in plain.stdout


@pytest.mark.parametrize("task", OPTIONS)
def test_a_run_that_ctrl_c_stops_resumes_exactly(data, trained, tmp_path, monkeypatch, task):
    steps, forward = [], LadderModel.forward

    def counted(self, *args, **kwargs):
        if self.training:
            steps.append(1)
            if len(steps) == 5:
                signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LadderModel, "forward", counted)
        cut = train(*data[task], tmp_path / "run", *OPTIONS[task])
    assert cut.exit_code == 130, cut.output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-5"]
    result = train(*data[task], tmp_path / "run", *OPTIONS[task], "--resume")
    assert result.exit_code == 0, result.output
    whole = trained(task)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("train", "dev", "test", "trials"):
        assert metrics(tmp_path / "run")[name] == metrics(whole)[name]


def test_tags_are_predicted_for_every_word_and_written_as_conll(data, trained, tmp_path):
    wanted = read_conll(data[TAGS][2])
    bare = tmp_path / "bare.txt"
    bare.write_text("\n\n".join("\n".join(words) for words in wanted.words) + "\n")
    result = run("predict", "--model", trained(TAGS), "--data", bare)
    assert result.exit_code == 0, result.output
    (tmp_path / "p.conll").write_text(result.stdout)
    got = read_conll(tmp_path / "p.conll")
    assert got.words == wanted.words
    right = [a == b for p, w in zip(got.tags, wanted.tags, strict=True) for a, b in zip(p, w, strict=True)]
    assert sum(right) / len(right) == metrics(trained(TAGS))["accuracy"]
    rows = json.loads(run("predict", "--model", trained(TAGS), "--data", data[TAGS][2], "--json").stdout)["predictions"]
    assert [row["tags"] for row in rows] == got.tags
    for name in ("q.conll", "q.tsv", "q.jsonl"):
        assert run("predict", "--model", trained(TAGS), "--data", bare, "--out", tmp_path / name).exit_code == 0
    assert (tmp_path / "q.conll").read_text() == (tmp_path / "q.tsv").read_text() == result.stdout
    assert [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()] == rows


def test_a_long_sentence_is_tagged_in_pieces_and_scored_without_its_end(trained, tmp_path):
    words = ["good", "film", "was", "fine", "fine"] * 20
    path = tmp_path / "long.conll"
    path.write_text("".join(f"{word} {'B-PER' if word == 'good' else 'O'}\n" for word in words))
    rows = json.loads(run("predict", "--model", trained(TAGS), "--data", path, "--json").stdout)["predictions"]
    assert (rows[0]["tokens"], len(rows[0]["tags"])) == (words, len(words))
    result = run("eval", "--model", trained(TAGS), "--data", path, "--json")
    assert result.stderr == f"{path}: 1 texts are longer than the model's 32 tokens and were cut\n"


def test_part_of_speech_tags_are_selected_by_accuracy(data, tmp_path):
    lines = ["good JJ 1", "film NN 1", "was VB 0", "", "the DT 1", "plot NN 1", ""] * 15
    path = tmp_path / "pos.conll"
    path.write_text("\n".join(lines))
    out = tmp_path / "run"
    result = train(data[TAGS][0], path, path, out, *OPTIONS[TAGS], "--tag-column", 1, "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert metrics(out)["selected_by"] == "dev accuracy"
    assert set(metrics(out)["test"]) == {"accuracy", "n"}
    assert metrics(out)["settings"]["tag_column"] == 1


def test_images_of_a_flat_folder_are_predicted_by_name(data, trained, tmp_path):
    folder = data[IMAGES][2]
    right = 0
    for name in ("blue", "red"):
        result = run("predict", "--model", trained(IMAGES), "--data", folder / name, "--json")
        rows = json.loads(result.stdout)["predictions"]
        assert [row["file"] for row in rows] == sorted(path.name for path in (folder / name).iterdir())
        assert all(0.5 <= row["probability"] <= 1 for row in rows)
        right += sum(row["prediction"] == name for row in rows)
    assert right / 20 == metrics(trained(IMAGES))["accuracy"]
    plain = run("predict", "--model", trained(IMAGES), "--data", folder / "red").stdout
    assert plain.startswith("file\tprediction\tprobability\n001.png\t")
    kept = metrics(trained(IMAGES))["saved_bytes_batch"]
    assert kept == {"samples": 8, "height": 16, "width": 16}


def test_prompts_are_continued_whatever_their_lengths(trained, tmp_path):
    prompts = ["0 1 2 3", "7 8", "3 4 5 6 7 8", "9"]
    rows = []
    for names in (prompts, *([prompt] for prompt in prompts)):  # together, and each alone
        path = tmp_path / "prompts.tsv"
        path.write_text("text\n" + "".join(f"{prompt}\n" for prompt in names))
        result = run("predict", "--model", trained(CAUSAL), "--data", path, "--max-new-tokens", 3, "--json")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        rows += json.loads(result.stdout)["predictions"]
    assert rows[:4] == rows[4:]
    assert all(len(row["prediction"].split()) == 3 for row in rows)
    (tmp_path / "one.txt").write_text("0 1 2\n")
    plain = run("predict", "--model", trained(CAUSAL), "--data", tmp_path / "one.txt", "--max-new-tokens", 2)
    assert list(json.loads(plain.stdout)) == ["prediction"]


def test_a_long_prompt_keeps_its_end(trained, tmp_path):
    path = tmp_path / "long.tsv"
    path.write_text("text\n" + "9 " * 40 + "0 1 2 3\n")
    result = run("predict", "--model", trained(CAUSAL), "--data", path, "--max-new-tokens", 4)
    assert result.exit_code == 0
    assert result.stderr == f"{path}: 1 texts are longer than the model's 32 tokens and were cut\n"


def test_running_text_is_read_from_a_text_file(data, tmp_path):
    files = [write_counting(tmp_path / f"{name}.txt", 60, seed) for seed, name in enumerate(("train", "test"))]
    result = train(data[CAUSAL][0], *files, tmp_path / "run", *OPTIONS[CAUSAL], "--epochs", 1, "--json")
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    tokens = sum(len(path.read_text().split()) + 1 for path in files[1:])  # and one end of text
    assert got["test"]["tokens"] + got["test"]["n"] == tokens  # the first of a block is not predicted


def test_texts_are_written_for_texts(data, trained, tmp_path):
    out = tmp_path / "p.csv"
    assert run("predict", "--model", trained(SEQ2SEQ), "--data", data[SEQ2SEQ][2], "--out", out).exit_code == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    lines = [line.split("\t")[1] for line in data[SEQ2SEQ][2].read_text().splitlines()[1:]]
    matches = [row["prediction"] == line for row, line in zip(rows, lines, strict=True)]
    assert sum(matches) / len(matches) == metrics(trained(SEQ2SEQ))["test"]["exact_match"]
    short = run("predict", "--model", trained(SEQ2SEQ), "--data", data[SEQ2SEQ][2], "--max-new-tokens", 1, "--json")
    assert all(len(row["prediction"].split()) <= 1 for row in json.loads(short.stdout)["predictions"])


def test_layers_of_both_stacks_are_chosen(trained):
    ladder = json.loads((trained(SEQ2SEQ) / "config.json").read_text())["ladder"]
    assert (ladder["layers"], ladder["decoder_layers"]) == ([1], [0, 1])


def test_sets_of_labels_are_predicted_and_read_back(data, trained, tmp_path):
    out = tmp_path / "p.tsv"
    assert run("predict", "--model", trained(SETS), "--data", data[SETS][2], "--out", out).exit_code == 0
    rows = [line.split("\t") for line in out.read_text().splitlines()[1:]]
    labels = [line.split("\t")[1] for line in data[SETS][2].read_text().splitlines()[1:]]
    right = [row[0] == label for row, label in zip(rows, labels, strict=True)]
    assert sum(right) / len(right) == metrics(trained(SETS))["accuracy"]
    assert {row[0] for row in rows} <= {"", "good", "bad", "bad|good"}
    assert all(0.25 <= float(row[1]) <= 1 for row in rows)  # at least one half for each label
