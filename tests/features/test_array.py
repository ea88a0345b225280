"""The .npy file that appears whole or not at all."""

import errno
import json
import os

import numpy as np
import pytest

pytest.importorskip("transformers")

from tlfast.data import InputError
from tlfast.features import FeatureFile, array

SETTINGS = {"backbone": "a", "layer": None}
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_two(path, error=KeyboardInterrupt):
    """A run that breaks off after two of four rows."""
    file = FeatureFile(path)
    with pytest.raises(error), file.session((4, 3), SETTINGS, resume=False):
        file.write([3, 0], ROWS[[3, 0]], cut=1)
        raise error
    return file


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_in_any_order_and_nothing_else_beside_the_file(tmp_path):
    file = FeatureFile(tmp_path / "f.npy")
    with file.session((4, 3), SETTINGS, resume=False):
        file.write([3, 0], ROWS[[3, 0]])
        assert files(tmp_path) == ["f.npy.part", "f.npy.part.json"]
        file.write([1, 2], ROWS[[1, 2]])
    assert files(tmp_path) == ["f.npy"]
    found = np.load(tmp_path / "f.npy")
    assert found.dtype == np.float32 and np.array_equal(found, ROWS)


def test_an_interrupted_run_goes_on(tmp_path):
    first = write_two(tmp_path / "f.npy")
    assert first.unfinished and files(tmp_path) == ["f.npy.part", "f.npy.part.json"]
    file = FeatureFile(tmp_path / "f.npy")
    with file.session((4, 3), SETTINGS, resume=True):
        assert (file.done, file.cut) == (2, 1)
        file.write([1, 2], ROWS[[1, 2]], cut=1)
    assert file.cut == 2
    assert np.array_equal(np.load(tmp_path / "f.npy"), ROWS)
    assert files(tmp_path) == ["f.npy"]


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    np.save(tmp_path / "f.npy", ROWS[:1])
    write_two(tmp_path / "f.npy")
    assert np.array_equal(np.load(tmp_path / "f.npy"), ROWS[:1])
    file = FeatureFile(tmp_path / "f.npy")
    with file.session((4, 3), SETTINGS, resume=True):
        file.write([1, 2], ROWS[[1, 2]])
    assert np.array_equal(np.load(tmp_path / "f.npy"), ROWS)


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    file = FeatureFile(tmp_path / "f.npy")
    with pytest.raises(KeyboardInterrupt), file.session((4, 3), SETTINGS, resume=False):
        raise KeyboardInterrupt
    assert files(tmp_path) == []


def test_what_is_counted_as_done_survives_a_kill(tmp_path, fresh_process):
    """Killed without any chance to tidy up; progress is written with every row here."""
    code = f"""
import os, signal, numpy as np
from tlfast.features import FeatureFile, array
array._SAVE_SECONDS = -1.0
file = FeatureFile({str(tmp_path / "f.npy")!r})
if os.fork() == 0:
    with file.session((4, 3), {SETTINGS}, resume=False):
        file.write([3, 0], np.arange(6, dtype=np.float32).reshape(2, 3))
        os.kill(os.getpid(), signal.SIGKILL)
print(os.wait()[1])
"""
    assert fresh_process(code) == "9"
    file = FeatureFile(tmp_path / "f.npy")
    with file.session((4, 3), SETTINGS, resume=True):
        assert file.done == 2
        file.write([1, 2], ROWS[[1, 2]])
    assert np.load(tmp_path / "f.npy")[[3, 0]].tolist() == [[0, 1, 2], [3, 4, 5]]


def refuses(message, file, shape=(4, 3), settings=SETTINGS, resume=False):
    before = files(file.path.parent)
    with pytest.raises(InputError, match=message), file.session(shape, settings, resume):
        pytest.fail("the session began")
    assert files(file.path.parent) == before


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = array.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(array.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    refuses("f.npy: needs 1.5 MiB, and 1.0 MiB are free there; free some", FeatureFile(tmp_path / "f.npy"), (1024, 384))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate")
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left on the device"), (errno.EDQUOT, "quota is used up")]
)
def test_a_disk_that_others_fill_meanwhile(tmp_path, monkeypatch, number, message):
    def full(*_):
        raise OSError(number, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refuses(message, FeatureFile(tmp_path / "f.npy"))


def test_the_whole_file_is_allocated_at_the_beginning(tmp_path):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("no posix_fallocate")
    file = FeatureFile(tmp_path / "f.npy")
    with file.session((1000, 100), SETTINGS, resume=False):
        assert 512 * file.part.stat().st_blocks >= 400_000


def test_paths_that_cannot_be(tmp_path):
    (tmp_path / "d.npy").mkdir()
    for path, message in (
        ("f.txt", "the features are an .npy file; name one, such as f.npy"),
        ("f", "the features are an .npy file"),
        ("d.npy", "there is a folder of that name"),
        ("none/f.npy", "its folder does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            FeatureFile(tmp_path / path)


def test_a_second_run_does_not_begin_over_an_unfinished_one(tmp_path):
    write_two(tmp_path / "f.npy")
    refuses("f.npy.part: holds an unfinished run; add --resume to go on with it", FeatureFile(tmp_path / "f.npy"))


def test_resuming_what_is_another_run_or_none(tmp_path):
    path = tmp_path / "f.npy"
    refuses("no unfinished run to resume; leave --resume out", FeatureFile(path), resume=True)
    write_two(path)
    other = SETTINGS | {"layer": 3}
    refuses("started with layer=None, not 3; resume it with the same", FeatureFile(path), settings=other, resume=True)
    refuses(r"holds \(4, 3\), not \(5, 3\)", FeatureFile(path), (5, 3), resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"settings": SETTINGS, "done": 2})])
def test_a_damaged_state(tmp_path, content):
    write_two(tmp_path / "f.npy").state.write_text(content)
    refuses("f.npy.part.json: the file is damaged", FeatureFile(tmp_path / "f.npy"), resume=True)


def test_a_damaged_part(tmp_path):
    write_two(tmp_path / "f.npy").part.write_bytes(b"nothing")
    refuses("the file is damaged", FeatureFile(tmp_path / "f.npy"), resume=True)
