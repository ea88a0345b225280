"""Bad input to tlfast ladder: status 2, one line that says what and how to fix it, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("typer")

from .ladder_runs import refused, run, save_backbone, train, write_sentences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Backbone, data files and a trained ladder."""
    folder = tmp_path_factory.mktemp("data")
    save_backbone(folder / "bert")
    save_backbone(folder / "other", seed=1)
    write_sentences(folder / "train.tsv", 60, 0)
    write_sentences(folder / "test.tsv", 20, 2)
    assert train(folder / "bert", folder / "train.tsv", folder / "test.tsv", folder / "run").exit_code == 0
    return folder


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the trained ladder, to break."""
    shutil.copytree(data / "run", tmp_path / "model")
    return tmp_path / "model"


def write(path, *rows, header="text\tlabel"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


TWELVE = ["good film\t1", "bad film\t0"] * 6

BAD_FILES = {
    "missing column": (["a\t1"], "txt\tlabel", "no column 'text'; it has 'txt', 'label'"),
    "no rows": ([], "text\tlabel", "a header and no rows"),
    "one class only": (["good film\t1"] * 12, "text\tlabel", "every row has the label '1'"),
    "empty text": ([*TWELVE, " \t1"], "text\tlabel", "line 14: the column 'text' is empty"),
    "ragged row": ([*TWELVE, "good"], "text\tlabel", "line 14: 1 fields where the header has 2"),
    "nan target": (["a\t0.5", "b\tnan"] * 6, "text\tlabel", "line 3: the label is nan"),
    "too few to split": (["a\t0", "b\t1"], "text\tlabel", "2 rows are too few"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_training_files(data, tmp_path, case):
    rows, header, message = BAD_FILES[case]
    path = write(tmp_path / "bad.tsv", *rows, header=header)
    refused(train(data / "bert", path, data / "test.tsv", tmp_path / "run"), str(path), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--train", "--dev", "--test"])
def test_missing_files(data, tmp_path, option):
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run", option, "none.tsv")
    refused(result, "none.tsv: there is no such file; check the path")
    assert not (tmp_path / "run").exists()


def test_an_extension_that_is_not_read(data, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    refused(train(data / "bert", tmp_path / "a.txt", data / "test.tsv", tmp_path / "run"), "'.txt' is not known")


def test_a_dev_label_that_is_not_in_training(data, tmp_path):
    dev = write(tmp_path / "dev.tsv", "good film\t1", "bad film\t2")
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run", "--dev", dev)
    refused(result, f"{dev}, line 3: the label '2' is not in the training data")
    assert not (tmp_path / "run").exists()


def test_a_bad_test_file_costs_no_training(data, tmp_path):
    path = write(tmp_path / "test.tsv", "good film\t1", "bad film\t2")
    out = tmp_path / "run"
    result = train(data / "bert", data / "train.tsv", path, out, "--json")
    refused(result, "line 3: the label '2' is not in the training data", "add --resume")
    assert sorted(entry.name for entry in out.iterdir()) == ["checkpoints", "run.json"]
    write(path, "good film\t1", "bad film\t0")
    stamps = {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*/optimizer.pt")}
    assert train(data / "bert", data / "train.tsv", path, out, "--resume").exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "checkpoints").glob("*/optimizer.pt")} == stamps


def test_backbones_that_are_not_there(data, tmp_path):
    files = (data / "train.tsv", data / "test.tsv", tmp_path / "run")
    refused(train(tmp_path / "none", *files), "there is no such folder; pass the right one with --backbone")
    (tmp_path / "empty").mkdir()
    refused(train(tmp_path / "empty", *files), "there is no config.json in it")


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_backbone_with_a_damaged_configuration(data, tmp_path, content):
    folder = shutil.copytree(data / "bert", tmp_path / "bert")
    (folder / "config.json").write_text(content)
    refused(
        train(folder, data / "train.tsv", data / "test.tsv", tmp_path / "run"), "cannot be loaded", "mend its files"
    )


def test_a_backbone_without_a_vocabulary(data, tmp_path):
    folder = shutil.copytree(data / "bert", tmp_path / "bert")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    result = train(folder, data / "train.tsv", data / "test.tsv", tmp_path / "run")
    refused(result, "its tokenizer has no vocabulary; add tokenizer.json or vocab.txt")


def test_a_damaged_backbone(data, tmp_path):
    folder = shutil.copytree(data / "bert", tmp_path / "bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(
        train(folder, data / "train.tsv", data / "test.tsv", tmp_path / "run"), "cannot be loaded", "mend its files"
    )


def test_a_name_that_cannot_be_fetched(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = train("nobody/nothing-of-this-name", data / "train.tsv", data / "test.tsv", tmp_path / "run")
    assert result.exit_code == 2
    fetching, error = result.stderr.splitlines()
    assert fetching == "nobody/nothing-of-this-name is not in the cache; fetching it from Hugging Face"
    assert error.startswith("error: backbone 'nobody/nothing-of-this-name': cannot be loaded")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lr", "fast", "pass a number, or several separated by commas"),
        ("--lr", "-1", "must be a finite number above 0"),
        ("--lr", "nan", "must be a finite number above 0"),
        ("--lr", "1e-3,0.001", "a learning rate is there twice"),
        ("--average", "1", "average: got 1.0; pass None or a decay in [0, 1)"),
        ("--layers", "first", 'pass "all" or block indices'),
        ("--layers", "7", "7"),
        ("--init", "magic", "'magic' is not available; allowed: 'prune', 'pca', 'random'"),
        ("--dropout", "2", "dropout: got 2.0"),
        ("--precision", "int3", "precision: 'int3' is not available"),
        ("--reduction", "5", "reduction"),
        ("--tap-storage", "float3", "tap_storage: 'float3' is not available; allowed: 'keep', 'int8', 'project'"),
        ("--side-precision", "fp16", "side_precision: 'fp16' is not available; allowed: 'fp32', 'bf16'"),
        ("--tap-dim", "8", "--tap-dim 8: means nothing for --tap-storage keep; leave it out"),
        ("--tap-storage", "project", "tap_dim: 96 is more than the 32 channels of a tap; pass at most 32"),
    ],
)
def test_bad_settings(data, tmp_path, option, value, message):
    out = tmp_path / "run"
    refused(train(data / "bert", data / "train.tsv", data / "test.tsv", out, option, value), message)
    assert not out.exists()


def test_offloading_without_a_gpu(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run", "--tap-storage", "offload")
    refused(result, "--tap-storage offload", "there is no GPU; use int8 or stream")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_becomes_nan(data, tmp_path):
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run", "--lr", "1e30", "--json")
    refused(result, "NaN or infinite with learning rate 1e+30; pass a lower one")


def test_a_folder_that_holds_a_run(data):
    before = {path: path.stat().st_mtime_ns for path in (data / "run").rglob("*")}
    refused(
        train(data / "bert", data / "train.tsv", data / "test.tsv", data / "run"), "already holds a run", "--resume"
    )
    assert {path: path.stat().st_mtime_ns for path in (data / "run").rglob("*")} == before


def test_nothing_to_resume(data, tmp_path):
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run", "--resume")
    refused(result, "holds no run to resume; leave --resume out")
    assert not (tmp_path / "run").exists()


def test_out_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        refused(train(data / "bert", data / "train.tsv", data / "test.tsv", out), str(out), "or pass another --out")


def test_a_full_disk(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    try:
        result = train(data / "bert", data / "train.tsv", data / "test.tsv", disk / "run", "--json")
        refused(result, "no space left on the device; free some, or pass another --out")
        assert list(disk.iterdir()) == []
        result = run("predict", "--model", data / "run", "--data", data / "test.tsv", "--out", disk / "none" / "p.tsv")
        refused(result, "its folder does not exist; make it")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# saved ladders


def test_folders_without_a_trained_ladder(data, tmp_path):
    data_file = ("--data", data / "test.tsv")
    refused(run("eval", "--model", tmp_path / "none", *data_file), "there is no such folder")
    refused(run("predict", "--model", tmp_path, *data_file), "holds no trained model (task.json is missing)")


def test_the_wrong_backbone_for_a_saved_ladder(data):
    result = run("eval", "--model", data / "run", "--data", data / "test.tsv", "--backbone", data / "other")
    refused(result, "are not those the ladder in", "pass that backbone")


def test_a_backbone_that_has_moved(data, broken):
    task = json.loads((broken / "task.json").read_text())
    (broken / "task.json").write_text(json.dumps({**task, "backbone": "/gone/bert"}))
    arguments = ("eval", "--model", broken, "--data", data / "test.tsv")
    refused(run(*arguments), "'/gone/bert': there is no such folder", "--backbone")
    assert run(*arguments, "--backbone", data / "bert").exit_code == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b"\x10"),
        ("model.safetensors", b"cut"),
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("task.json", b"{"),
        ("task.json", b"{}"),
        ("task.json", b"\xff"),
    ],
)
def test_damaged_ladders(data, broken, name, content):
    path = broken / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:2000] if content == b"cut" else content)
    refused(run("predict", "--model", broken, "--data", data / "test.tsv"), str(broken))


def test_bad_files_to_eval_and_predict(data, tmp_path):
    model = ("--model", data / "run")
    unknown = write(tmp_path / "a.tsv", "good film\t5")
    refused(run("eval", *model, "--data", unknown), "line 2: the label '5' is not in the training data")
    assert run("predict", *model, "--data", unknown).exit_code == 0
    result = run("predict", *model, "--data", data / "test.tsv", "--out", tmp_path / "p.xls")
    refused(result, "the extension '.xls' is not known; use one of .tsv, .csv, .jsonl")


def test_mistakes_in_the_code_keep_their_traceback(data, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("tlfast.training.results", broken)
    with pytest.raises(ValueError, match="a bug"):
        train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run")


def test_the_installed_command_reports_in_one_line(data, tmp_path):
    code = "from tlfast.cli import main; main()"
    arguments = ["ladder", "eval", "--model", str(tmp_path), "--data", str(data / "test.tsv"), "--json"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_bare_installation_names_the_extra_to_install(fresh_process):
    code = """
import sys
for name in ("transformers", "huggingface_hub", "accelerate", "tqdm", "rich", "matplotlib"):
    sys.modules[name] = None
from tlfast.cli import main
sys.argv = ["tlfast", "ladder", "eval", "--model", "m", "--data", "d.tsv"]
try:
    main()
except SystemExit as stop:
    print(stop.code)
"""
    assert fresh_process(code) == "2"


def test_a_second_column_that_is_not_there(data, tmp_path):
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run", "--pair-column", "sentnce2")
    refused(result, "no column 'sentnce2'")


def test_a_backbone_that_lacks_weights(data, tmp_path):
    folder = shutil.copytree(data / "bert", tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = train(folder, data / "train.tsv", data / "test.tsv", tmp_path / "run")
    refused(result, "lack 1 tensors, such as encoder.layer.1.output.dense.weight")


def test_a_finished_run_is_not_resumed_with_another_test_file(data):
    result = train(data / "bert", data / "train.tsv", data / "train.tsv", data / "run", "--resume")
    refused(result, "is finished, with another test file")


def test_somebody_elses_tokenizer_folder_is_not_replaced(data, tmp_path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    refused(train(data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run"), "already holds a run")


def test_more_than_a_hundred_epochs(data, tmp_path):
    few = write_sentences(tmp_path / "few.tsv", 24, seed=5)
    result = train(data / "bert", few, few, tmp_path / "run", "--epochs", 120, "--batch-size", 16, "--dev", few)
    assert result.exit_code == 0, result.stderr
