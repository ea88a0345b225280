"""What the commands of klite read: several captions an image, names, flat folders, and scores made in pieces."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from typer.testing import CliRunner

from tests.cli.klite_runs import write_all
from tests.cli.ladder_runs import refused
from tlfast.cli import app, image_text, klite_records, klite_zeroshot
from tlfast.cli.klite_records import Records, read_records
from tlfast.contrastive import DualEncoder
from tlfast.data import InputError, read_image_texts
from tlfast.knowledge import embeddings
from tlfast.training import processes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("klite"))


@pytest.fixture(autouse=True)
def wordnet(data, monkeypatch):
    monkeypatch.setenv("TLFAST_WORDNET", str(data / "wordnet"))


def run(*arguments):
    return CliRunner().invoke(app, ["klite", *map(str, arguments)], catch_exceptions=False)


def write_rows(data, path, captions, labels=False):
    """A table with so many captions an image, an image's rows far from each other and its path written differently."""
    files = sorted((data / "train").rglob("*.png"))
    rows = []
    for i in range(captions):
        for file in files:
            name = f"{file.parent}/{'../' + file.parent.name + '/' if i else ''}{file.name}"
            row = {"image": name, "caption": f"caption {i} of {file.parent.name} {file.stem}"}
            rows.append(row | ({"label": file.parent.name} if labels else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("labels", [False, True])
def test_all_captions_of_an_image_are_on_one_side(data, tmp_path, labels):
    path = write_rows(data, tmp_path / "rows.jsonl", 3, labels)
    records = read_records(path, None, None, None, 0)
    train, dev = (set(part.same_file) for part in (records.train, records.dev))
    assert train.isdisjoint(dev) and len(train) + len(dev) == 48 and len(dev) >= 4
    assert len(records.train) == len(set(records.train.captions)) == 3 * len(train)
    assert len(records.dev) == len(set(records.dev.captions)) == (3 if labels else 1) * len(dev)


def test_captions_of_an_image_are_no_mistakes_for_each_other(data, tmp_path):
    files = sorted((data / "train").rglob("*.png"))[:5]
    said = [(0, "a"), (1, "b"), (2, "c"), (0, "d"), (3, "b"), (3, "e"), (4, "f")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": str(files[i]), "caption": text}) + "\n" for i, text in said))
    records = read_records(path, data / "captions.jsonl", None, None, 0)
    encoder = image_text.load_image_text(str(data / "clip"), None).encoder
    known = image_text.Knowledge(None, None, None, True, "first", None, "auto", True)
    texts = klite_records.make_texts(records, known, None, encoder, 0.5)
    labels = texts.bank.labels[texts.train].tolist()
    same = [[other for other in range(7) if labels[other] == label] for label in labels]
    assert same == [[0, 3], [1, 4, 5], [2], [0, 3], [1, 4, 5], [1, 4, 5], [6]]


def test_pictures_that_changed_are_other_data(data, tmp_path):
    for file in sorted((data / "train").rglob("*.png"))[:3]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = sorted(file.name for file in tmp_path.iterdir())
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": name, "caption": name}) + "\n" for name in names))

    def digest():
        return read_records(path, data / "captions.jsonl", None, None, 0).picture_digest()

    before = digest()
    assert digest() == before
    (tmp_path / names[0]).write_bytes((tmp_path / names[1]).read_bytes())
    assert digest() != before


def test_names_give_candidates_of_which_there_is_no_image(data, tmp_path):
    images = read_image_texts(data / "test")
    alone = image_text.classes_of(images, None)
    rows = ["label\tname", *(f"{label}\t{label}" for label in (*alone.labels, "a lynx"))]
    (tmp_path / "names.tsv").write_text("\n".join(rows) + "\n")
    classes = image_text.classes_of(images, tmp_path / "names.tsv")
    assert set(classes.labels) == {*alone.labels, "a lynx"} and len(classes.labels) == len(alone.labels) + 1
    found = run(
        "eval", "--backbone", data / "clip", "--data", data / "test", "--names", tmp_path / "names.tsv", "--json"
    )
    assert json.loads(found.stdout)["classes"] == len(classes.labels)


def test_a_dev_image_is_classified_by_one_caption_and_no_other_of_its_own(data, tmp_path):
    path = write_rows(data, tmp_path / "rows.jsonl", 2)
    dev = read_records(data / "captions.jsonl", path, None, None, 0).dev
    assert len(dev) == len(set(dev.same_file)) == 48
    assert all(caption.startswith("caption 0 of") for caption in dev.captions)


def test_retrieval_takes_any_caption_of_an_image(data, tmp_path, monkeypatch):
    path = write_rows(data, tmp_path / "rows.jsonl", 2)
    asked = []
    monkeypatch.setattr("tlfast.contrastive.evaluation.retrieve", lambda *given: asked.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("eval", "--backbone", data / "clip", "--data", path)
    _, _, captions, images = asked[0]
    assert captions == list(range(96)) and images == [*range(48)] * 2


def test_predictions_are_made_in_pieces_and_only_where_they_are_wanted(data, tmp_path, monkeypatch):
    arguments = ("zeroshot", "--backbone", data / "clip", "--data", data / "test", "--dev", data / "dev", "--out")
    assert run(*arguments, tmp_path / "whole.tsv", "--json").exit_code == 0
    monkeypatch.setattr(klite_zeroshot, "_ROWS", 5)
    monkeypatch.setattr(embeddings, "_ROWS", 5)
    assert run(*arguments, tmp_path / "pieces.tsv", "--json").exit_code == 0
    assert (tmp_path / "pieces.tsv").read_text() == (tmp_path / "whole.tsv").read_text()
    assert len((tmp_path / "pieces.tsv").read_text().splitlines()) == 25
    monkeypatch.setattr(klite_zeroshot, "_predictions", lambda *given: 1 / 0)
    assert run(*arguments[:-1]).exit_code == 0
    monkeypatch.setattr(klite_zeroshot, "format_rows", lambda *given: "")
    with pytest.raises(ZeroDivisionError):
        run(*arguments, tmp_path / "again.tsv")


def test_accuracy_in_pieces(monkeypatch):
    torch.manual_seed(0)
    names, images, labels = torch.randn(4, 8), torch.randn(23, 8), torch.arange(23) % 4
    classes = embeddings.ClassEmbeddings(names, torch.randn(4, 8))
    whole = classes.accuracy(images, labels)
    widest = []
    made = torch.Tensor.argmax
    monkeypatch.setattr(
        torch.Tensor, "argmax", lambda x, *given, **more: widest.append(len(x)) or made(x, *given, **more)
    )
    monkeypatch.setattr(embeddings, "_ROWS", 5)
    assert classes.accuracy(images, labels) == whole and max(widest) == 5


def test_a_flat_folder_is_no_test(data):
    images = read_image_texts(data / "train")
    for classes in (None, image_text.classes_of(images, None)):
        with pytest.raises(InputError, match="test images need classes or captions; make a folder for each class"):
            Records(images, images, classes, data / "flat").read_test()


def test_only_the_first_process_speaks_of_long_captions(data, monkeypatch, capsys):
    encoder = image_text.load_image_text(str(data / "clip"), None).encoder
    for first in (True, False):
        monkeypatch.setattr(processes, "is_first", lambda first=first: first)
        klite_records._caption_groups([("", "a long caption " * 40)], [0], None, encoder)
        assert ("lose their end" in capsys.readouterr().err) is first


@pytest.mark.parametrize("option", ["--train", "--dev", "--names"])
def test_captions_have_no_probe_and_no_names(data, option):
    given = ("eval", "--backbone", data / "clip", "--data", data / "captions.jsonl", option, data / "train")
    refused(run(*given), f"{option}: means nothing for images with captions and no labels")


def test_a_name_given_twice_is_refused(data, tmp_path):
    (tmp_path / "names.tsv").write_text("label\tname\nseal\tseal\nred_kite\tkite\nseal\tshark\n")
    given = ("zeroshot", "--backbone", data / "clip", "--data", data / "test", "--names", tmp_path / "names.tsv")
    refused(run(*given), "names.tsv, line 4: the label 'seal' is there already; keep one row")


def test_a_model_whose_towers_do_not_fit_is_refused(data, monkeypatch):
    def broken(self, *given):
        raise ValueError("text: its features have 5 numbers")

    monkeypatch.setattr(DualEncoder, "__init__", broken)
    refused(run("zeroshot", "--backbone", data / "clip", "--data", data / "test"), "text: its features have 5 numbers")
