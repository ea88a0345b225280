"""tlfast klite train under torchrun: what one process gives, from two that share each batch; also after --resume."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.cli.klite_runs import write_all
from tests.distributed.test_command import interrupt_and_resume, metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("klite"))


def command(data, out, *more):
    files = ["--backbone", data / "vit", "--text-backbone", data / "bert", "--train", data / "train"]
    files += ["--dev", data / "dev", "--test", data / "test", "--out", out]
    return ["klite", "train", *map(str, files), "--batch-size", "8", "--lr", "1e-3", "--json", *more]


def same(one, two, folders):
    for name in ("accuracy", "top5", "loss"):
        assert one["dev"][name] == pytest.approx(two["dev"][name], rel=1e-4)
    assert one["logit_scale"] == pytest.approx(two["logit_scale"], rel=1e-5)
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in first.items():
        if not name.endswith("k_proj.bias"):  # attention does not depend on it, so it follows what is rounded
            difference = (tensor.float() - second[name].float()).abs().max()
            assert difference < 1e-3 * tensor.float().abs().max() + 1e-6, name


@pytest.mark.parametrize("image_train", ["head", "full"])
def test_two_processes_train_what_one_trains(data, tmp_path, image_train):
    # one text a class: which process draws what is then all the same
    more = ["--no-knowledge", "--epochs", "3", "--image-train", image_train]
    folders = [tmp_path / str(count) for count in (1, 2)]
    one, two = (metrics(command(data, folder, *more), i) for i, folder in enumerate(folders, 1))
    same(one, two, folders)
    assert one["test"] == two["test"]


def test_two_processes_go_on_after_an_interruption(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TLFAST_WORDNET", str(data / "wordnet"))
    folders = [tmp_path / name for name in ("whole", "cut")]
    more = ["--epochs", "12", "--image-train", "full"]
    whole = metrics(command(data, folders[0], *more), 2)
    cut = interrupt_and_resume(command(data, folders[1], *more), folders[1] / "checkpoints")
    same(whole, cut, folders)
