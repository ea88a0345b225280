"""Data whose taps come from a cache, on small backbones of many families: a ladder sees what it saw without one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tlfast
from tests.models import DECODERS, ENCODER_DECODERS, END, IMAGE_ENCODERS, PAD, VOCABULARY, task_of, tiny
from tlfast.backbone import FrozenBackbone, tap_cache
from tlfast.data import InputError, PadBatch, TokenDataset, stack_batch
from tlfast.training import TapReader, TaskData, evaluate, on_cache
from tlfast.training.scores import ClassScoring

FAMILIES = ["bert", "modernbert", "deberta-v2", "vit", "gpt2", "opt-projected", "llama", "gemma2", "t5", "bart"]
LENGTHS = [5, 9, 1, 12, 3, 7, 2]


class Pictures:
    """Images at hand, as ImageDataset has them in files."""

    truncated = 0

    def __init__(self, count):
        self.pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.labels, self.lengths = [i % 3 for i in range(count)], [1] * count

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def beside_taps(self, index):
        return {"labels": self.labels[index]}

    def digest(self):
        return "pictures"


def texts(family, lengths, seed=0):
    draw = random.Random(seed)

    def ids(count):
        return [draw.randint(END + 1, VOCABULARY - 1) for _ in range(count)]

    rows = [ids(count) for count in lengths]
    labels = [draw.randint(0, 2) for _ in lengths]
    if family in DECODERS:
        labels = rows
    if family in ENCODER_DECODERS:
        labels = [ids(1 + count % 4) for count in lengths]
    return TokenDataset({"input_ids": rows, "attention_mask": [[1] * count for count in lengths], "labels": labels})


def make_data(family, lengths=LENGTHS, side="right"):
    if family in IMAGE_ENCODERS:
        return TaskData(Pictures(5), Pictures(3), stack_batch, ClassScoring())
    kind = "tokens" if family in DECODERS or family in ENCODER_DECODERS else "given"
    collate = PadBatch(PAD, 0, 64, side, kind)
    return TaskData(texts(family, lengths), texts(family, [4, 6, 1], 1), collate, ClassScoring())


def make_ladder(family, precision="fp32", **settings):
    torch.manual_seed(0)
    config = tlfast.LadderConfig(**{"reduction": 2, "init": "random", **settings})
    backbone = tlfast.freeze(tiny(family), precision=precision)
    return tlfast.LadderModel(backbone, task=task_of(family), num_labels=3, config=config)


def on(folder, data, ladder, storage="exact", **identity):
    reader = TapReader(ladder.look, {"fingerprint": ladder.backbone.fingerprint(), **identity}, torch.device("cpu"))
    return on_cache(data, folder, reader, storage)


def step(ladder, batch):
    """Loss, logits where something is to be predicted, and gradients, with dropout from a seed."""
    ladder.train().zero_grad()
    torch.manual_seed(1)
    result = ladder(**batch)
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in ladder.named_parameters() if p.grad is not None}
    return result.loss.detach(), gradients


def no_backbone(*_args, **_inputs):
    raise AssertionError("the backbone ran")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_the_cache_is_a_step_on_the_backbone(tmp_path, monkeypatch, family):
    ladder, data = make_ladder(family), make_data(family, side="left" if family == "llama" else "right")
    cached, report = on(tmp_path, data, ladder)
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    for samples in ([2, 0, 3], [4, 1]):
        plain = step(ladder, data.collate([data.train[i] for i in samples]))
        batch = cached.collate([cached.train[i] for i in samples])
        assert "input_ids" not in batch and "pixel_values" not in batch
        with monkeypatch.context() as patch:
            for name in ("forward", "encode", "decode"):
                patch.setattr(FrozenBackbone, name, no_backbone)
            seen = step(ladder, batch)
        torch.testing.assert_close(seen[0], plain[0], rtol=1e-5, atol=1e-6)
        assert seen[1].keys() == plain[1].keys()
        for name, gradient in plain[1].items():
            torch.testing.assert_close(seen[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_in_bfloat16_the_step_is_the_same_to_the_last_bit(tmp_path, family):
    ladder, data = make_ladder(family, "bf16"), make_data(family)
    cached, _ = on(tmp_path, data, ladder)
    for samples in ([2, 0, 3], [5], [4, 1, 6]):
        loss, gradients = step(ladder, data.collate([data.train[i] for i in samples]))
        seen = step(ladder, cached.collate([cached.train[i] for i in samples]))
        assert torch.equal(seen[0], loss)
        assert all(torch.equal(seen[1][name], gradient) for name, gradient in gradients.items())


def test_the_blocks_that_have_rungs_are_kept_and_no_others(tmp_path):
    data = make_data("bert")
    sizes = [on(tmp_path / str(k), data, make_ladder("bert", layers=list(range(k))))[1].bytes for k in (1, 2)]
    rows = sum(LENGTHS) + 4 + 6 + 1
    assert sizes[1] - sizes[0] == pytest.approx(rows * 48 * 4, abs=256)  # headers differ a little


def test_scores_of_cached_dev_data_and_of_others_beside_them(tmp_path):
    ladder, data = make_ladder("bert", "bf16"), make_data("bert")
    cached, _ = on(tmp_path, data, ladder)
    for part in ("train", "dev"):
        expected = evaluate(ladder, getattr(data, part), data.collate, data.scoring)
        assert evaluate(ladder, getattr(cached, part), cached.collate, cached.scoring) == expected
    some = evaluate(ladder, cached.train.select([3, 1]), cached.collate, cached.scoring)
    assert some == evaluate(ladder, data.train.select([3, 1]), data.collate, data.scoring)
    other = texts("bert", [3, 8], 2)
    expected = evaluate(ladder, other, data.collate, data.scoring)
    assert evaluate(ladder, other, cached.collate, cached.scoring) == expected


@pytest.mark.parametrize(
    ("lengths", "batches"), [([6], [[0]]), ([0, 4, 0, 2], [[0, 1], [2], [3, 0]])], ids=["one text", "without tokens"]
)
def test_small_data(tmp_path, lengths, batches):
    ladder, data = make_ladder("bert", "bf16"), make_data("bert", lengths)
    cached, _ = on(tmp_path, data, ladder)
    for samples in batches:
        expected = ladder.eval()(**data.collate([data.train[i] for i in samples])).logits
        assert torch.equal(ladder(**cached.collate([cached.train[i] for i in samples])).logits, expected)


def test_the_space_is_checked_for_train_and_dev_together(tmp_path, monkeypatch):
    ladder, data = make_ladder("bert"), make_data("bert")
    _, report = on(tmp_path / "a", data, ladder)
    usage = tap_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tap_cache.shutil, "disk_usage", lambda _: usage._replace(free=report.bytes - 1))
    with pytest.raises(InputError, match="the taps need"):
        on(tmp_path / "b", data, ladder)
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    assert on(tmp_path / "a", data, ladder)[1].filled_bytes == 0  # nothing is missing there


def test_int8_is_near(tmp_path):
    ladder, data = make_ladder("bert"), make_data("bert")
    cached, _ = on(tmp_path, data, ladder, "int8")
    samples = list(range(len(LENGTHS)))
    expected = ladder.eval()(**data.collate([data.train[i] for i in samples])).logits
    found = ladder(**cached.collate([cached.train[i] for i in samples])).logits
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_data_are_known_by_their_contents():
    one = texts("bert", LENGTHS)
    assert one.digest() == texts("bert", LENGTHS).digest()
    assert one.digest() != texts("bert", LENGTHS, 1).digest()
    assert one.digest() != one.select([1, 0, *range(2, len(LENGTHS))]).digest()
    assert TokenDataset({"input_ids": [[1, 2], [3]]}).digest() != TokenDataset({"input_ids": [[1], [2, 3]]}).digest()
    labels = np.asarray(one.labels) + 1
    assert one.digest() != TokenDataset(one.columns | {"labels": labels.tolist()}).digest()


def test_taps_for_a_ladder_that_has_not_started_are_refused():
    ladder = make_ladder("bert", init="prune")
    output = ladder.look(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="backbone_output: the starting weights are not set; pass calibration"):
        ladder(backbone_output=output)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    """Trainer would share a batch between them by nn.DataParallel, which does not split what is read from a cache."""
    ladder = make_ladder("bert")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reader = TapReader(ladder.look, {}, torch.device("cuda"))
    with pytest.raises(InputError, match="several GPUs in one process cannot read it; start by torchrun"):
        on_cache(make_data("bert"), tmp_path / "c", reader)
    assert not (tmp_path / "c").exists()
