"""The benchmark of emoji without the emoji: its splits, its figures, its network, and what it fetches."""

import io
import json
import os
import stat
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

from benchmarks import emoji, zero_shot
from benchmarks.convnet import Conv, ConvNet, Views, optimisers, plain_view
from benchmarks.pictures import STORED, PictureSet, Trial, has_no_seen_word, read_folder, split_classes, store
from tests.knowledge.small_wordnet import offset_of, write_wordnet
from tlfast.data import InputError
from tlfast.knowledge import WordNet

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_classes_are_split_once_and_for_all():
    seen, unseen = split_classes(range(1146))
    assert (len(seen), len(unseen)) == (974, 172)
    assert sorted([*seen.tolist(), *unseen.tolist()]) == list(range(1146))
    assert torch.equal(split_classes(range(1146))[1], unseen)


def test_words_of_seen_names():
    names = [("cat with tears",), ("dog",), ("hot-dog",), ("tiger with a hat",), ("sheep", "cat")]
    assert has_no_seen_word(names, [0, 1]).tolist() == [False, False, False, True, True]


def test_rank_counts_what_scores_higher_and_equal():
    trial = Trial(torch.tensor([0, 2, 3]), torch.tensor([4, 7, 9]))
    labels = torch.tensor([9, 0, 4, 7])  # of the rows: 9, 4 and 7
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.2, 0.2, 0.1]])
    assert zero_shot.rank(scores, trial, labels).tolist() == [0, 2, 1]


def test_rates_have_intervals_over_classes():
    classes = torch.arange(50).repeat_interleave(2)
    hits = torch.stack([torch.arange(100) < 60, torch.arange(100) < 40])
    found = zero_shot.rate(hits, classes)
    assert found.mean == pytest.approx(0.5)
    deviation = np.sqrt(np.var([1.0] * 20 + [0.5] * 10 + [0.0] * 20) / 50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert zero_shot.rate(torch.ones(3, 100, dtype=torch.bool), classes) == zero_shot.Rate(1.0, 1.0, 1.0)


def test_conv_is_pytorchs():
    ours, theirs = Conv(3, 5, 3, 2), nn.Conv2d(3, 5, 3, 2, 1, bias=False)
    theirs.weight.data = ours.weight.detach().view(5, 3, 3, 3).permute(0, 3, 1, 2)
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_views_of_what_is_transparent():
    torch.manual_seed(0)
    clear = torch.zeros(64, 4, STORED, STORED)
    assert (plain_view(clear, 32) == 1).all()
    coloured = Views(log_contrast=0.0, brightness=0.0, log_saturation=0.0, hue=0.0, grey=0.0).draw(clear, 32)
    assert coloured.shape == (64, 3, 32, 32)
    assert torch.allclose(coloured, coloured[..., :1, :1].expand_as(coloured), atol=1e-5)  # plain backgrounds
    white = (coloured > 1 - 1e-5).all(dim=(1, 2, 3)).float().mean()
    assert 0.3 < white < 0.7
    assert not torch.equal(Views().draw(clear, 32), Views().draw(clear, 32))


def test_unmoved_views_are_the_picture_and_its_mirror_image():
    pictures = torch.rand(2, 4, 32, 32)
    pictures[:, 3] = 1
    assert torch.allclose(plain_view(pictures, 32), pictures[:, :3], atol=1e-5)
    assert torch.allclose(plain_view(pictures, 32, mirrored=True), pictures[:, :3].flip(-1), atol=1e-5)
    still = Views(**dict.fromkeys(Views.__dataclass_fields__, 0.0)).draw(pictures, 32)
    same = torch.stack(
        [(still - view).abs().amax(dim=(1, 2, 3)) for view in (pictures[:, :3], pictures[:, :3].flip(-1))]
    )
    assert (same.amin(dim=0) < 1e-4).all()


def test_every_parameter_has_one_optimiser():
    network = nn.ModuleList([ConvNet(2), nn.Linear(8, 4)])
    found = optimisers(network, 0.01, 0.05)
    held = [id(p) for optimiser in found for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, network.parameters()))


class Words(nn.Module):
    """A text encoder that is never asked: the texts' features are at hand."""

    num_features = WIDTH

    def forward(self, input_ids):
        raise AssertionError


@pytest.fixture(scope="module")
def colours():
    """Plain pictures whose class is their colour, and texts that say it; of 60 classes 9 are never trained on."""
    generator = torch.Generator().manual_seed(0)
    shades = torch.rand(60, 3, generator=generator)
    labels = torch.arange(60).repeat_interleave(2)
    pictures = torch.full((120, 4, STORED, STORED), 255, dtype=torch.uint8)
    pictures[:, :3] = (255 * shades[labels]).round().to(torch.uint8)[:, :, None, None]
    vectors = nn.functional.normalize((shades - 0.5) @ torch.randn(3, WIDTH, generator=generator), dim=1)
    seen, unseen = split_classes(range(60))
    held = torch.isin(labels, unseen)
    trials = {"unseen": Trial(held.nonzero().flatten(), unseen)}
    names = tuple((str(number),) for number in range(60))
    data = PictureSet(pictures, labels, names, seen, (~held).nonzero().flatten(), trials)
    texts = dict.fromkeys((zero_shot.NAMES, zero_shot.DEFINITIONS, zero_shot.BOTH), vectors)
    return data, zero_shot.Texts(texts, {})


def test_what_is_never_trained_on_is_found_by_its_text_and_not_by_a_shuffled_one(colours):
    data, texts = colours
    views = Views(hue=0.0, log_saturation=0.0, grey=0.0, log_contrast=0.02, brightness=0.01)
    settings = zero_shot.Settings(width=4, size=16, steps=120, batch=51, average=0.9, views=views)
    lines = []
    outcome = zero_shot.run(data, texts, Words(), settings, (0, 1), lines.append)
    found = zero_shot.rates(outcome, data, "unseen")
    assert {ranks.shape for kind, ranks in outcome.ranks["unseen"].items() if kind != "pixels"} == {(2, 18)}
    for kind in (zero_shot.NAMES, zero_shot.DEFINITIONS, zero_shot.BOTH):
        assert found[kind][1].mean > 0.45, found  # 1 in 9 by chance
        assert found[kind][5].mean > 0.9, found
    assert found[zero_shot.SHUFFLED][1].mean < 0.35, found
    assert found["pixels"][1].mean > 0.25, found  # the nearest colour's text is near the right one, too
    assert len(outcome.seconds) == 2 and len(lines) == 4


def test_the_shuffled_texts_do_not_move_the_network(colours):
    data, texts = colours
    learner = zero_shot.Learner(data, texts, Words(), zero_shot.Settings(width=2), 0)
    learner.duals = {zero_shot.SHUFFLED: learner.duals[zero_shot.SHUFFLED]}
    learner.loss(torch.rand(8, 3, 32, 32), data.labels[data.training[:8]]).backward()
    assert all(parameter.grad is None for parameter in learner.network.parameters())
    assert all(parameter.grad is not None for parameter in learner.heads[zero_shot.SHUFFLED].parameters())


def test_a_folder_of_images(tmp_path):
    for number in range(20):
        (tmp_path / f"big_cat_{number}").mkdir()
        for i in range(10):
            Image.new("RGB", (50, 30), (number, i, 0)).save(tmp_path / f"big_cat_{number}" / f"{i}.png")
    data = read_folder(tmp_path)
    assert data.names[0] == ("big cat 0",) and len(data.seen) == 17
    unseen, others = data.trials.values()
    assert len(unseen.rows) == 30 and len(others.rows) == 17 * 2 and len(data.training) == 17 * 8
    assert set(data.training.tolist()).isdisjoint([*unseen.rows.tolist(), *others.rows.tolist()])
    assert data.pictures.shape == (200, 4, STORED, STORED)


def test_a_folder_that_is_too_small_to_split(tmp_path):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        for i in range(4):
            Image.new("RGB", (9, 9), (number, i, 0)).save(tmp_path / str(number) / f"{i}.png")
    trials = read_folder(tmp_path).trials
    assert all(len(trial.rows) for trial in trials.values()) and len(trials) == 2
    (tmp_path / "3" / "0.png").unlink()
    with pytest.raises(
        InputError, match="has 4 classes, of which '3' has 3 images; pass at least 4 classes of 4 images"
    ):
        read_folder(tmp_path)
    for file in (tmp_path / "3").iterdir():
        file.unlink()
    (tmp_path / "3").rmdir()
    with pytest.raises(InputError, match="has 3 classes"):
        read_folder(tmp_path)


def test_wordnet_ids_are_read_as_words(tmp_path, monkeypatch):
    wordnet = WordNet(write_wordnet(tmp_path / "wordnet"))
    read = []
    monkeypatch.setattr(
        zero_shot.knowledge, "make_prompts", lambda spoken, *given, **more: read.extend(spoken) or 1 / 0
    )
    monkeypatch.setattr(zero_shot.knowledge, "choose_nearest", lambda matches, encode: [m.senses[0] for m in matches])
    monkeypatch.setattr(zero_shot, "TextEncoder", lambda *given: SimpleNamespace(features=None, max_length=16))
    monkeypatch.setattr(zero_shot, "_dual", lambda *given: None)
    monkeypatch.setattr(zero_shot.knowledge.TokenBudget, "of_tokenizer", lambda *given: None)
    wnid = f"n{offset_of('kite_bird'):08d}"
    with pytest.raises(ZeroDivisionError):
        zero_shot.embed_texts([(wnid,), ("shark", "fish")], wordnet, None, None)
    assert read == ["kite", "shark", "fish"]


def entry(name, **changes):
    base = {f"has_img_{vendor}": True for vendor in emoji.VENDORS}
    base |= {"name": name.upper(), "short_name": name, "short_names": [name], "image": f"{name}.png"}
    return base | {"category": "Objects", "unified": "1F600"} | changes


ENTRIES = [
    entry("cat", short_names=["cat", "house_cat"]),
    entry("heart", category="Symbols"),
    entry("clock3"),
    entry("man cook", category="People & Body", unified="1F468-200D-1F373"),
    entry("rare", has_img_facebook=False),
    entry("dog"),
]


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A command npm that packs small packages, and a cache beside it."""
    (tmp_path / "bin").mkdir()
    for vendor in emoji.VENDORS:
        with tarfile.open(tmp_path / f"emoji-datasource-{vendor}@{emoji.VERSION}", "w:gz") as package:
            picture = io.BytesIO()
            Image.new("RGBA", (64, 64), (200, 0, 0, 128)).save(picture, "png")
            files = {"package/emoji.json": json.dumps(ENTRIES).encode()}
            files |= {f"package/img/{vendor}/64/{e['image']}": picture.getvalue() for e in ENTRIES}
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                package.addfile(member, io.BytesIO(content))
    script = tmp_path / "bin" / "npm"
    script.write_text(f'#!/bin/sh\ncp "{tmp_path}/$2" packed.tgz\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TLFAST_CACHE", str(tmp_path / "cache"))
    return script


def test_things_are_fetched_once_and_no_archive_stays(npm, tmp_path):
    pictures, labels, vendors, names = emoji._read_all()
    assert names == (("cat", "house cat"), ("dog",))
    assert labels.tolist() == [0, 1] * 3 and vendors.tolist() == [0, 0, 1, 1, 2, 2]
    assert pictures.shape == (6, 4, STORED, STORED)
    assert abs(pictures[0, 0].float().mean() - 200 * 128 / 255) < 1.5  # colours times opacity
    assert sorted(path.name for path in emoji.cache_folder().iterdir()) == sorted(f"{v}.npz" for v in emoji.VENDORS)
    npm.unlink()
    assert emoji._read_all()[3] == names


def test_what_cannot_be_fetched_says_why(npm, tmp_path, monkeypatch):
    npm.write_text("#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    with pytest.raises(emoji.CannotFetch, match=r"npm cannot fetch emoji-datasource-google@.*: no network"):
        emoji.load()
    assert list(emoji.cache_folder().iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(emoji.CannotFetch, match="npm, which fetches them, is not installed"):
        emoji.load()


def test_dev_has_nothing_of_the_test(monkeypatch):
    names = tuple((f"thing {number}",) for number in range(200))
    labels, vendors = torch.arange(200).repeat(3), torch.arange(3).repeat_interleave(200)
    pictures = store(torch.zeros(600, 4, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(emoji, "_read_all", lambda: (pictures, labels, vendors, names))
    data, dev = emoji.load(), emoji.load_dev()
    unseen = set(data.trials["unseen classes"].candidates.tolist())
    (trial,) = dev.trials.values()
    for rows in (dev.training, trial.rows):
        assert unseen.isdisjoint(labels[rows].tolist()) and (vendors[rows] < 2).all()
    assert set(labels[dev.training].tolist()).isdisjoint(trial.candidates.tolist())
    assert (vendors[data.training] < 2).all() and unseen.isdisjoint(labels[data.training].tolist())
    assert {name: (len(trial.rows), len(trial.candidates)) for name, trial in data.trials.items()} == {
        "unseen classes": (60, 30),
        "unseen classes without a word of seen names": (0, 30),  # all are called thing
        "unseen classes, unseen vendor": (30, 30),
        "seen classes, unseen vendor": (170, 170),
    }
