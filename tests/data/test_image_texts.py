"""Images with classes and captions, from folders and tables."""

import json

import pytest

from tests.contrastive.pictures import COLOURS, class_folders, draw
from tlfast.data import InputError, read_image_texts

pytest.importorskip("PIL")


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "images", 2)


def test_folders_of_classes_and_flat_ones(folder):
    images = read_image_texts(folder)
    assert len(images) == 8 and images.labelled and images.captions == [""] * 8 and images.lines is None
    assert sorted(set(images.labels)) == sorted(name.replace(" ", "_") for name in COLOURS)
    assert images.where(0) == str(images.files[0])
    flat = read_image_texts(folder / "seal")
    assert flat.labels == ["", ""] and not flat.labelled
    some = images.select([3, 0])
    assert some.files == [images.files[3], images.files[0]] and some.labels == [images.labels[3], images.labels[0]]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_tables(folder, suffix):
    rows = [("seal/0.png", "seal", ""), (str(folder / "seal/1.png"), "", "a  seal asleep"), ("seal/1.png", "x", "y")]
    path = folder / f"table.{suffix}"
    if suffix == "jsonl":
        lines = [json.dumps(dict(zip(("image", "label", "caption"), row, strict=True))) for row in rows]
        lines[0] = json.dumps({"image": "seal/0.png", "label": "seal"})
    else:
        lines = [("\t" if suffix == "tsv" else ",").join(row) for row in (("image", "label", "caption"), *rows)]
    path.write_text("\n".join(lines) + "\n")
    images = read_image_texts(path)
    assert images.files == [folder / "seal/0.png", folder / "seal/1.png", folder / "seal/1.png"]
    assert images.labels == ["seal", "", "x"] and images.captions == ["", "a seal asleep", "y"]
    first = 1 if suffix == "jsonl" else 2
    assert images.lines == [first, first + 1, first + 2] and images.where(1) == f"{path}, line {first + 1}"
    assert images.select([2]).lines == [first + 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("picture\tlabel\nseal/0.png\ta\n", "there is no column 'image'"),
        (
            "image\tclass\nseal/0.png\ta\n",
            "there is no column 'label' and no column 'caption'; it has 'image', 'class'",
        ),
        ("image\tlabel\tlabel\nseal/0.png\ta\tb\n", "the column 'label' is there 2 times"),
        ("image\tlabel\n", "a header and no rows"),
        ("image\tlabel\n\ta\n", "line 2: names no image"),
        ("image\tlabel\nseal/0.png\t\n", "line 2: has neither a label nor a caption"),
        ("image\tlabel\nseal/9.png\ta\n", "line 2: there is no image"),
        ("image\tlabel\nseal/0.txt\ta\n", "line 2: .* is no image by its extension"),
        ("image\tlabel\nseal/bad.png\ta\n", "bad.png: the image is broken"),
        ("image\tlabel\nseal/0.png\n", "line 2: 1 fields where the header has 2"),
    ],
)
def test_tables_that_are_refused(folder, content, message):
    (folder / "seal" / "0.txt").write_text("text")
    (folder / "seal" / "bad.png").write_text("text")
    (folder / "table.tsv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_image_texts(folder / "table.tsv")


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="there is no such folder or file"):
        read_image_texts(tmp_path / "nowhere.tsv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there are no classes in it"):
        read_image_texts(tmp_path / "empty")
    draw(folder / "beside.png", (0, 0, 0), 0)
    with pytest.raises(InputError, match="lies beside the folders of the classes"):
        read_image_texts(folder)
