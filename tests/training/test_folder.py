"""The folder of a run: claimed, resumed, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tlfast.data import InputError
from tlfast.training import RunFolder, Settings, fit, write_whole
from tlfast.training.folder import last_checkpoint, writing_to

from .bag import Bag, make_data


def test_a_run_claims_its_folder_and_gives_it_back_when_it_fails(tmp_path):
    run = RunFolder(tmp_path / "a" / "b")
    with pytest.raises(ZeroDivisionError), run.session({"x": 1}, resume=False):
        assert json.loads((run.path / "run.json").read_text()) == {"x": 1}
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_whole_checkpoints_and_removes_others(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.session({"x": 1}, resume=False):
        for name in ("checkpoint-1", "checkpoint-2", "lr-0.1/checkpoint-3"):
            (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / "checkpoint-1" / "trainer_state.json").write_text("{}")
        raise ZeroDivisionError
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["checkpoints/checkpoint-1/trainer_state.json", "run.json"]
    assert list(tmp_path.rglob("checkpoint-[23]")) == []
    with run.session({"x": 1}, resume=True):
        pass
    with pytest.raises(InputError, match="started with x=1, not 2"), run.session({"x": 2}, resume=True):
        pass
    with pytest.raises(InputError, match="already holds a run"), run.session({"x": 1}, resume=False):
        pass


def test_there_must_be_a_run_to_resume(tmp_path):
    run = RunFolder(tmp_path / "none")
    with pytest.raises(InputError, match="no run to resume"), run.session({}, resume=True):
        pass
    assert not run.path.exists()


def test_results_appear_together_or_not_at_all(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.publish() as folder:
        (folder / "model").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with run.publish() as folder:
        run.write_metrics(folder, {"accuracy": 1.0})
        (folder / "tokenizer").mkdir()
        assert not run.finished
    assert run.finished
    assert run.read_metrics() == {"accuracy": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "tokenizer"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_disk_errors_become_one_line_and_others_pass(code, tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: .*, or pass another --out$"), writing_to(tmp_path):
        raise OSError(code, "no")
    with pytest.raises(OSError), writing_to(tmp_path):
        raise OSError(errno.EIO, "broken disk")
    with pytest.raises(RuntimeError, match="a bug"), writing_to(tmp_path):
        raise RuntimeError("a bug")


def test_a_file_is_written_whole_or_not(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.tsv", "x\n")
    assert (tmp_path / "a.tsv").read_text() == "x\n"

    def full(self, text, encoding):
        self.touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="no space left"):
        write_whole(tmp_path / "a.tsv", "y\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]
    assert (tmp_path / "a.tsv").read_text() == "x\n"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("room", [0, 8, 20, 28, 90, 120, 240])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tiny_disk, room):
    (tiny_disk / "filler").write_bytes(b"x" * 1024 * (252 - room))
    run = RunFolder(tiny_disk / "run")
    with pytest.raises(InputError, match="no space left"), run.session({"x": 1}, resume=False):
        big = Settings(epochs=4, batch_size=8, learning_rates=(0.1,))
        fit(Bag, make_data(), big, run.checkpoints)
        with run.publish() as folder:
            (folder / "model").write_bytes(b"x" * 400_000)
    assert run.has_checkpoint() == run.path.exists()
    assert not list(tiny_disk.rglob(".unfinished*"))
    assert all(last_checkpoint(path.parent) for path in tiny_disk.rglob("checkpoint-*"))
