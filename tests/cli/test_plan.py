"""tlfast plan: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from tests.cli.ladder_runs import refused
from tests.planning.cases import CONFIGS
from tlfast.cli import app

FEW = ("--precision", "bf16", "--dtype", "fp32", "--reduction", "4", "--length", "16", "--batch", "2")


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a configuration and no weights."""
    path = tmp_path_factory.mktemp("bert")
    CONFIGS["bert"].save_pretrained(path)
    return path


def test_a_folder_without_weights(folder, tmp_path):
    result = run("--backbone", folder, *FEW, "--samples", 1000, "--out", tmp_path / "plan", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["model_type"], found["task"], found["length"]) == ("bert", "sequence-classification", 16)
    by_storage = {row["setting"].get("tap_storage"): row for row in found["rows"]}
    assert set(by_storage) == {None, "keep", "int8", "project", "stream", "offload"}
    keep = by_storage["keep"]
    assert keep["cache"] == 1000 * keep["cache_sample"] and keep["total"] == keep["weights"] + keep["peak"]
    assert json.loads((tmp_path / "plan" / "plan.json").read_text()) == found
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.png"]


def test_a_file_and_its_folder_give_the_same(folder):
    results = [run("--backbone", source, *FEW, "--json") for source in (folder, folder / "config.json")]
    first, second = (json.loads(result.stdout) for result in results)
    assert first["rows"] == second["rows"]


def test_the_table(folder):
    result = run("--backbone", folder, *FEW, "--storage", "keep")
    assert result.exit_code == 0, result.stderr
    for word in ("LoRA r=8, checkpointing", "ladder r=4", "linear probe", "least memory: full fine-tuning, fp32: "):
        assert word in result.stdout
    assert "stream" not in result.stdout


def test_settings_of_training_count(folder):
    given = ("--backbone", folder, *FEW, "--storage", "keep", "--precision", "fp32", "--json")
    settings = {"plain": (), "averaged": ("--average", "0.998"), "rounded": ("--side-precision", "bf16")}
    rows = {}
    for name, options in settings.items():
        rows[name] = json.loads(run(*given, *options).stdout)["rows"][-1]
    assert rows["averaged"]["optimizer"] == rows["plain"]["optimizer"] + 4 * rows["plain"]["trained"]
    assert rows["rounded"]["saved"] < rows["plain"]["saved"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch", "0"], ["--batch 0", "at least 1"]),
        (["--samples", "-1"], ["--samples -1"]),
        (["--precision", "fp4"], ["--precision 'fp4'", "fp32, bf16, int8, nf4"]),
        (["--storage", "keep,shelf"], ["--storage 'shelf'", "stream"]),
        (["--reduction", "7"], ["reduction: 7", "allowed"]),
        (["--layers", "1,99"], ["layers: 99", "0 to 3"]),
        (["--layers", "some"], ["--layers 'some'"]),
        (["--length", "5000"], ["length", "5000"]),
        (["--task", "causal-lm"], ["task: 'causal-lm'", "bert"]),
        (["--target-length", "4"], ["--target-length", "sequence-classification"]),
        (["--targets", "wings"], ["targets", "wings"]),
        (["--average", "1"], ["--average 1.0", "[0, 1)"]),
        (["--side-precision", "int8"], ["side_precision: 'int8'", "'fp32', 'bf16'"]),
    ],
)
def test_misuse(folder, options, words):
    refused(run("--backbone", folder, "--reduction", "4", "--length", "16", *options), *words)


def test_what_is_no_configuration(tmp_path):
    refused(run("--backbone", tmp_path / "nowhere"), "there is no such folder")
    refused(run("--backbone", tmp_path), "no config.json")
    for text in ("{", "[]", '{"hidden_size": 8}', '{"model_type": "wings"}'):
        (tmp_path / "config.json").write_text(text)
        refused(run("--backbone", tmp_path / "config.json"), "is not the configuration of a transformers model")
    refused(run("--backbone", tmp_path), "its configuration cannot be read")


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(run("--backbone", folder, *FEW, "--out", tmp_path / "file"), "is a file; pass a folder")
    assert (tmp_path / "file").read_text() == "mine"
