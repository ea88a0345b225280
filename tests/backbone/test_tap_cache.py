"""The tap cache by itself: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tlfast.backbone import BackboneOutput, EncoderDecoderOutput, tap_cache, tap_shards
from tlfast.backbone.tap_cache import Looked, TapCache, check_space

WIDTH = 12
IDENTITY = {
    "fingerprint": "f" * 64, "precision": "bf16", "tokenizer": "t" * 64, "max_length": 32, "data": "d" * 64,
    "taps": {"backbone": [0, 1]},
}  # fmt: skip
COUNTS = [3, 1, 7, 0, 5, 2, 4, 4]


def tokens(sample, count, width=WIDTH, dtype=torch.float32, seed=0):
    """What a backbone is taken to give for one sample, one slot a seed."""
    generator = torch.Generator().manual_seed(1000 * sample + seed)
    return (torch.randn(count, width, generator=generator) * (1 + seed)).to(dtype)


def padded(rows, length, starts):
    out = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for row, (values, start) in enumerate(zip(rows, starts, strict=True)):
        out[row, start : start + len(values)] = values
    return out


def output_of(samples, counts, length, starts, dtype=torch.float32, last_is_tap=False):
    def slot(seed, width=WIDTH):
        return padded([tokens(i, counts[i], width, dtype, seed) for i in samples], length, starts)

    last = slot(2) if last_is_tap else slot(3, 8)
    return BackboneOutput(slot(0), (slot(1), slot(2)), last)


class Backbone:
    """Gives the outputs above, and notes what it was asked for. left: pads on that side."""

    def __init__(self, counts=COUNTS, dtype=torch.float32, last_is_tap=False, left=False):
        self.counts, self.dtype, self.last_is_tap, self.left = counts, dtype, last_is_tap, left
        self.asked = []

    def __call__(self, samples):
        self.asked.append(list(samples))
        length = max(self.counts[i] for i in samples) + 2
        starts = [length - self.counts[i] if self.left else 0 for i in samples]
        return Looked(self.output(samples, length, starts), {"backbone": starts})

    def output(self, samples, length, starts):
        return output_of(samples, self.counts, length, starts, self.dtype, self.last_is_tap)

    def cache(self, folder, storage="exact", **identity):
        example = self([int(np.argmax(self.counts))]).output
        self.asked.clear()
        return TapCache(folder, IDENTITY | identity, {"backbone": self.counts}, example, storage)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tap_cache, "_SHARD_SAMPLES", 3)


def read(cache, samples, length, starts=None):
    cache.expect(samples)
    starts = starts or [0] * len(samples)
    return cache.gather(samples, {"backbone": length}, {"backbone": starts}).output()


def assert_same(found, wanted):
    for a, b in zip(
        (found.embedding, *found.taps, found.last_hidden_state),
        (wanted.embedding, *wanted.taps, wanted.last_hidden_state),
        strict=True,
    ):
        assert a.dtype == b.dtype and torch.equal(a, b)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_what_goes_in_comes_out_to_the_last_bit(tmp_path, small_shards, poisoned, dtype, left):
    backbone = Backbone(dtype=dtype, left=left)
    cache = backbone.cache(tmp_path / "c")
    progress = []
    cache.fill(backbone, budget=9, progress=progress.append)
    assert sum(progress) == len(COUNTS)
    assert sorted(i for batch in backbone.asked for i in batch) == list(range(len(COUNTS)))
    assert names(tmp_path / "c") == ["manifest.json", *(f"taps-0000{i}.safetensors" for i in range(3))]
    again = backbone.cache(tmp_path / "c")
    for samples in ([5], [7, 0, 3, 2, 6], [3], list(range(8))):
        starts = [8 - COUNTS[i] if left else 0 for i in samples]
        assert_same(read(again, samples, 8, starts), backbone.output(samples, 8, starts))
    again.fill(backbone, budget=9)
    assert len(backbone.asked) == 0


def test_a_last_hidden_state_that_is_the_last_tap_is_stored_once(tmp_path):
    double, single = Backbone(), Backbone(last_is_tap=True)
    caches = [backbone.cache(tmp_path / name) for backbone, name in ((double, "a"), (single, "b"))]
    assert [part.slots for part in caches[1].parts] == [("embedding", "tap.0", "tap.1")]
    caches[1].fill(single, 9)
    assert_same(read(caches[1], [2, 4], 7), single.output([2, 4], 7, [0, 0]))


def test_the_shards_are_safetensors_files_as_the_docstring_says(tmp_path):
    backbone = Backbone()
    cache = backbone.cache(tmp_path)
    cache.fill(backbone, 9)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == cache.bytes
    with safe_open(tmp_path / "taps-00000.safetensors", framework="pt") as file:
        rows, offsets = file.get_tensor("backbone.0"), file.get_tensor("backbone.0.offsets")
        assert rows.shape == (3 * sum(COUNTS), WIDTH)
        first, end = offsets[2:4].tolist()
        sample = rows[3 * first : 3 * end].view(3, end - first, WIDTH)
    for seed, values in enumerate(sample):
        assert torch.equal(values, tokens(2, COUNTS[2], seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_errs_by_at_most_half_a_step_of_the_tokens_scale(tmp_path, dtype):
    backbone = Backbone(dtype=dtype)
    cache = backbone.cache(tmp_path, "int8")
    cache.fill(backbone, 9)
    found, wanted = read(cache, list(range(8)), 7), backbone.output(list(range(8)), 7, [0] * 8)
    for a, b in zip((found.embedding, *found.taps), (wanted.embedding, *wanted.taps), strict=True):
        assert a.dtype == dtype
        largest = b.float().abs().amax(-1, keepdim=True)
        assert ((a.float() - b.float()).abs() <= largest * (1 / 254 + torch.finfo(dtype).eps)).all()
    exact = Backbone(dtype=dtype).cache(tmp_path / "exact")
    assert cache.bytes < exact.bytes


def test_an_encoder_decoder_has_two_counts_a_sample(tmp_path):
    sources, targets = [4, 2, 5], [1, 6, 3]

    def output(samples):
        size = len(samples)
        return EncoderDecoderOutput(
            output_of(samples, sources, 6, [0] * size),
            output_of([i + 50 for i in samples], dict(zip(range(50, 53), targets, strict=True)), 7, [0] * size),
        )

    def look(samples):
        return Looked(output(samples), {"encoder": [0] * len(samples), "decoder": [0] * len(samples)})

    cache = TapCache(tmp_path, IDENTITY, {"encoder": sources, "decoder": targets}, output([0]))
    cache.fill(look, 20)
    found = cache.gather([2, 0], {"encoder": 6, "decoder": 7}, {"encoder": [0, 0], "decoder": [0, 0]}).output()
    assert_same(found.encoder, output([2, 0]).encoder)
    assert_same(found.decoder, output([2, 0]).decoder)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 30), st.data())
def test_any_counts_and_budgets(tmp_path, counts, budget, data):
    folder = tmp_path / str(len(os.listdir(tmp_path)))
    backbone = Backbone(counts)
    cache = backbone.cache(folder)
    cache.fill(backbone, budget)
    samples = data.draw(st.lists(st.sampled_from(range(len(counts))), min_size=1))
    assert_same(read(cache, samples, 10), backbone.output(samples, 10, [0] * len(samples)))


def test_processes_that_fill_it_together_share_the_shards(tmp_path, small_shards):
    first, second = Backbone(), Backbone()
    caches = [backbone.cache(tmp_path) for backbone in (first, second)]
    for turn, (cache, backbone) in enumerate(zip(caches, (first, second), strict=True)):
        cache.fill(backbone, 9, (turn, 2))
    assert sorted(i for batch in first.asked for i in batch) == [0, 1, 2, 6, 7]
    assert sorted(i for batch in second.asked for i in batch) == [3, 4, 5]
    assert_same(read(caches[1], [0, 4], 5), first.output([0, 4], 5, [0, 0]))


OTHERS = {
    "fingerprint": ("e" * 64, r"the backbone \(f{16}\.\.\. there, e{16}\.\.\. here\)"),
    "precision": ("fp32", r"the backbone's precision \(bf16 there, fp32 here\)"),
    "tokenizer": ("u" * 64, "the tokenizer or image processor"),
    "max_length": (64, r"the greatest length \(32 there, 64 here\)"),
    "data": ("c" * 64, "the data"),
    "taps": ({"backbone": [0, 2]}, r'the tapped blocks \(\{"backbone": \[0, 1\]\} there'),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_cache_of_something_else_is_refused(tmp_path, field):
    other, message = OTHERS[field]
    Backbone().cache(tmp_path)
    before = (tmp_path / "manifest.json").read_text()
    with pytest.raises(ValueError, match=message) as error:
        Backbone().cache(tmp_path, **{field: other})
    assert "pass another folder for the cache, or remove this one" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "manifest.json").read_text() == before


def test_another_version_storage_shape_or_size_is_refused(tmp_path, monkeypatch):
    Backbone().cache(tmp_path)
    for make, message in (
        (lambda: Backbone().cache(tmp_path, "int8"), r"the storage \(exact there, int8 here\)"),
        (lambda: Backbone(dtype=torch.bfloat16).cache(tmp_path), "the shapes of the taps"),
        (lambda: Backbone(COUNTS[:-1]).cache(tmp_path), r"the number of samples \(8 there, 7 here\)"),
        (lambda: Backbone([*COUNTS[:-1], 5]).cache(tmp_path), "number of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    monkeypatch.setattr("tlfast.__version__", "9.9")
    with pytest.raises(ValueError, match=r"the version of tlfast \(.* there, 9\.9 here\)"):
        Backbone().cache(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match=r"differs in format \(2 there, 1 here\)"):
        Backbone().cache(tmp_path)


def test_unknown_storage(tmp_path):
    with pytest.raises(ValueError, match="storage: 'int4' is not available; allowed: 'exact', 'int8'"):
        Backbone().cache(tmp_path / "c", "int4")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}'])
def test_a_damaged_manifest(tmp_path, content):
    Backbone().cache(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: .*the file is damaged"):
        Backbone().cache(tmp_path)


def test_a_folder_that_holds_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files and no manifest\.json, so it is no cache of taps"):
        Backbone().cache(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def filled(folder):
    backbone = Backbone()
    cache = backbone.cache(folder)
    cache.fill(backbone, 9)
    return cache


@pytest.mark.parametrize("cut", ["header", "half", "a byte", "all", "longer"])
def test_a_shard_of_another_length_is_neither_read_nor_kept(tmp_path, small_shards, cut):
    filled(tmp_path)
    path = tmp_path / "taps-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, {"header": 20, "half": size // 2, "a byte": size - 1, "all": 0, "longer": size + 1}[cut])
    backbone = Backbone()
    cache = backbone.cache(tmp_path)
    assert [shard.path for shard in cache.missing()] == [path]
    with pytest.raises(ValueError, match=r"taps-00001\.safetensors: is missing, cut short or not of this cache"):
        read(cache, [0, 4], 5)
    cache.fill(backbone, 9)
    assert sorted(i for batch in backbone.asked for i in batch) == [3, 4, 5]
    assert_same(read(cache, [0, 4], 5), backbone.output([0, 4], 5, [0, 0]))


def test_every_damaged_byte_of_the_numbers_is_seen(tmp_path):
    cache = filled(tmp_path)
    path = tmp_path / "taps-00000.safetensors"
    whole, start = path.read_bytes(), cache.shards[0].places.starts["backbone.0"]
    rows = 3 * WIDTH * 4 * sum(COUNTS)
    for place in range(start, start + rows, 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged; remove it and fill the cache again"):
            read(Backbone().cache(tmp_path), list(range(8)), 7)


def test_lost_blocks_which_read_as_zeros_are_seen(tmp_path):
    cache = filled(tmp_path)
    path = tmp_path / "taps-00000.safetensors"
    header = len(cache.shards[0].places.header)
    path.write_bytes(path.read_bytes()[:header] + bytes(path.stat().st_size - header))
    with pytest.raises(ValueError, match="is damaged"):
        read(Backbone().cache(tmp_path), [2], 7)


def test_a_shard_of_another_cache_is_not_taken_for_its_own(tmp_path, small_shards):
    filled(tmp_path / "a")
    other = Backbone()
    cache = other.cache(tmp_path / "b", data="c" * 64)
    cache.fill(other, 9)
    shutil.copy(tmp_path / "a" / "taps-00002.safetensors", tmp_path / "b")
    assert [shard.path.name for shard in cache.missing()] == ["taps-00002.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fill_keeps_whole_shards_and_goes_on(tmp_path, small_shards, error):
    backbone = Backbone()

    def look(samples):
        if 4 in samples:
            raise error
        return backbone(samples)

    with pytest.raises(error):
        backbone.cache(tmp_path).fill(look, 4)
    assert names(tmp_path) == ["manifest.json", "taps-00000.safetensors"]
    backbone.asked.clear()
    cache, progress = backbone.cache(tmp_path), []
    cache.fill(backbone, 4, progress=progress.append)
    assert progress[0] == 3 and sum(progress) == 8
    assert sorted(i for batch in backbone.asked for i in batch) == [3, 4, 5, 6, 7]
    assert_same(read(cache, [0, 4], 5), backbone.output([0, 4], 5, [0, 0]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("moment", [1, 2, 4, 5])
def test_a_killed_fill_keeps_whole_shards_and_goes_on(tmp_path, small_shards, moment):
    backbone = Backbone()

    def look(samples):
        if len(backbone.asked) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return backbone(samples)

    cache = backbone.cache(tmp_path)
    process = os.fork()
    if process == 0:
        cache.fill(look, 4)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert any(name.endswith(".unfinished") for name in names(tmp_path))
    cache = backbone.cache(tmp_path)
    cache.fill(backbone, 4)
    assert names(tmp_path) == ["manifest.json", *(f"taps-0000{i}.safetensors" for i in range(3))]
    assert_same(read(cache, list(range(8)), 7), backbone.output(list(range(8)), 7, [0] * 8))


@pytest.mark.skipif(tap_shards.fcntl is None, reason="no fcntl")
def test_two_runs_do_not_fill_a_cache_at_once(tmp_path):
    backbone = Backbone()

    def look(samples):
        with pytest.raises(ValueError, match="another run is filling this cache; wait until it is done"):
            backbone.cache(tmp_path).fill(backbone, 9)
        return backbone(samples)

    cache = backbone.cache(tmp_path)
    cache.fill(look, 99)
    assert_same(read(cache, [2], 7), backbone.output([2], 7, [0]))


@pytest.mark.parametrize(("where", "call"), [("posix_fallocate", 2), ("fsync", 3)])  # in the second shard
def test_a_disk_that_fills_up_leaves_whole_shards_alone(tmp_path, small_shards, monkeypatch, where, call):
    if not hasattr(os, where):
        pytest.skip(f"no os.{where}")
    backbone, real, calls = Backbone(), getattr(os, where), []

    def full(descriptor, *more):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, *more)

    cache = backbone.cache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError, match="No space left") as error:
            cache.fill(backbone, 99)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["manifest.json", "taps-00000.safetensors"]


def test_a_disk_that_is_too_small_is_known_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tap_cache.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    check_space(tmp_path, 2**20)
    with pytest.raises(ValueError, match=r"the taps need 1.5 MiB, and 1.0 MiB are free there; free some, store them"):
        check_space(tmp_path, 3 * 2**19)


def test_shards_end_at_their_samples_and_their_bytes(tmp_path, monkeypatch):
    size = 4 * (3 * WIDTH + 8)  # of a token
    monkeypatch.setattr(tap_cache, "_SHARD_BYTES", 9 * size)
    cache = Backbone([3, 3, 3, 20, 1, 1]).cache(tmp_path)
    assert cache._firsts.tolist() == [0, 3, 4]  # a sample that is larger alone has a shard of its own


def test_reading_does_not_gather_memory(fresh_process, tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {os.getcwd()!r})
import torch
from tlfast.backbone import BackboneOutput
from tlfast.backbone.tap_cache import Looked, TapCache
count, width = 256, 1024
def look(samples):
    x = torch.full((len(samples), 64, width), 1.0)
    return Looked(BackboneOutput(x, (x, x + 1), x), {{"backbone": [0] * len(samples)}})
cache = TapCache({str(tmp_path / "c")!r}, {{}}, {{"backbone": [64] * count}}, look([0]).output)
cache.fill(look, 256)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
cache.gather([0], {{"backbone": 64}}, {{"backbone": [0]}})
before = resident()
for sample in range(count):
    cache.gather([sample], {{"backbone": 64}}, {{"backbone": [0]}})
print(cache.bytes, resident() - before)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc")
    size, grown = map(int, fresh_process(code).split())
    assert size > 120 * 2**20
    assert grown < size / 3
