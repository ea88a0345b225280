"""Probes and scores of embeddings."""

import sys

import numpy as np
import pytest
import torch

from tlfast.contrastive.evaluation import classify, retrieve
from tlfast.contrastive.probing import few_shot, linear_probe
from tlfast.data import InputError

CLASSES, WIDTH = 3, 10


def features(each=20, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(WIDTH)[:CLASSES] * 2
    labels = list(range(CLASSES)) * each
    return centres[labels] + noise * torch.randn(len(labels), WIDTH, generator=generator), labels


def test_the_linear_probe_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, dev, test = (features(seed=seed) for seed in range(3))
    found = linear_probe(*train, *dev, *test, strengths=(0.01, 1.0))

    def scaled(x):
        return (x / x.norm(dim=1, keepdim=True) * WIDTH**0.5).numpy()

    scores = {}
    for strength in (0.01, 1.0):
        model = linear_model.LogisticRegression(C=strength, max_iter=1000).fit(scaled(train[0]), train[1])
        scores[strength] = [float(np.mean(model.predict(scaled(x)) == y)) for x, y in (dev, test)]
    assert found["dev"] == {"0.01": scores[0.01][0], "1": scores[1.0][0]}
    assert found["accuracy"] == scores[found["C"]][1] > 0.6 and found["n"] == 60
    assert found["C"] == max((0.01, 1.0), key=lambda c: (scores[c][0], -c))


def test_more_shots_are_better_and_seeds_differ():
    pytest.importorskip("sklearn")
    rows = few_shot(*features(), *features(100, 1), shots=(1, 16, 32), seeds=4)
    assert [row["shots"] for row in rows] == [1, 16, 32]
    assert rows[1]["accuracy"] > rows[0]["accuracy"] > 1 / CLASSES
    assert len(set(rows[0]["accuracies"])) > 1 and rows[0]["std"] > 0
    assert rows[0]["accuracy"] == pytest.approx(sum(rows[0]["accuracies"]) / 4)
    assert rows[2] == {"shots": 32, "missing": 20}
    assert few_shot(*features(), *features(100, 1), shots=(1, 16, 32), seeds=4) == rows


def test_what_a_probe_refuses(monkeypatch):
    x, labels = features()
    with pytest.raises(InputError, match="there is only one class"):
        few_shot(x, [0] * len(labels), x, labels)
    with pytest.raises(ValueError, match=r"test: features \(3, 10\) for 60 labels"):
        few_shot(x, labels, x[:3], labels)
    with pytest.raises(ValueError, match="shots, seeds"):
        few_shot(x, labels, x, labels, shots=(0,))
    with pytest.raises(ValueError, match="dev: features have NaN"):
        linear_probe(x, labels, x * float("nan"), labels, x, labels)
    monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    with pytest.raises(InputError, match="needs scikit-learn"):
        few_shot(x, labels, x, labels)


def test_classification_and_ties():
    classes = torch.eye(6)
    images = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 5, 4, 3, 2, 1]])
    assert classify(images, classes, [0, 0, 0]) == {"accuracy": 1 / 3, "top5": 2 / 3, "n": 3}
    assert classify(torch.zeros(1, 6), classes, [0])["top5"] == 0.0


def test_retrieval(monkeypatch):
    texts = torch.eye(8)
    images = texts.roll(1, 0)
    images[0] = texts[0]
    found = retrieve(images, texts)
    assert found["image_to_text"]["accuracy"] == 1 / 8 and found["text_to_image"]["n"] == 8
    monkeypatch.setattr("tlfast.contrastive.evaluation._ROWS", 3)
    assert retrieve(images, texts) == found
    assert retrieve(texts, texts)["text_to_image"]["accuracy"] == 1.0
    twice = torch.cat([texts, texts])  # the same caption twice: either is right
    assert retrieve(twice, twice)["image_to_text"] == {"accuracy": 0.0, "top5": 1.0, "n": 16}
    assert retrieve(twice, twice, [*range(8)] * 2)["image_to_text"]["accuracy"] == 1.0


def test_an_image_with_two_captions_is_found_by_either():
    images = torch.eye(6)[[0, 0, 1, 1]]
    texts = torch.eye(6)[[0, 4, 5, 1]]  # the image's other caption is as near as nothing
    alone, known = retrieve(images, texts), retrieve(images, texts, None, [0, 0, 1, 1])
    assert alone["image_to_text"]["accuracy"] == 0.5 and known["image_to_text"]["accuracy"] == 1.0
    assert alone["text_to_image"]["accuracy"] == 0.0 and known["text_to_image"]["accuracy"] == 0.5
    # equal captions and equal images are each right, though not the one by way of the other
    both = retrieve(torch.eye(6)[[0, 0, 1]], torch.eye(6)[[0, 1, 1]], [0, 1, 1], [0, 0, 1])
    assert both["image_to_text"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="same_image: 1 for 4 images"):
        retrieve(images, texts, None, [0])


@pytest.mark.parametrize(
    ("images", "classes", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), [0, 1], "must be (N, D), (C, D)"),
        (torch.zeros(0, 3), torch.zeros(2, 3), [], "must be (N, D), (C, D)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), [0, 2], "labels: must be 2 rows of the 2 classes"),
        (torch.zeros(2, 3), torch.full((2, 3), float("nan")), [0, 1], "classes: embeddings have NaN"),
    ],
)
def test_embeddings_that_do_not_fit(images, classes, labels, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        classify(images, classes, labels)
    with pytest.raises(ValueError, match="texts: 1 for 2 images"):
        retrieve(torch.zeros(2, 3), torch.zeros(1, 3))
