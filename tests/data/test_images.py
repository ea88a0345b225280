"""Folders of images: what is read, when it is opened, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from tlfast.data import (
    ImageDataset,
    InputError,
    Labels,
    fit_classes,
    read_image_classes,
    read_images,
    split_stratified,
    stack_batch,
)
from tlfast.data.images import open_image


def save(path, mode="RGB", colour=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 2), colour or 0).save(path, **more)
    return path


def processor(images, return_tensors):
    """The mean of each channel."""
    assert return_tensors == "pt"
    pixels = torch.from_numpy(np.array(images)).float()
    return {"pixel_values": pixels.mean((0, 1)).reshape(1, 3, 1, 1)}


@pytest.fixture
def folder(tmp_path):
    """Three classes, as people have them."""
    for name in ("dog/b.JPG", "dog/a.png", "cat/a.webp", "10/x.bmp", "9/y.gif"):
        save(tmp_path / "data" / name)
    (tmp_path / "data" / ".DS_Store").write_text("x")
    (tmp_path / "data" / "dog" / ".hidden.txt").write_text("x")
    return tmp_path / "data"


def test_classes_are_folders_and_images_are_in_order(folder):
    got = read_image_classes(folder)
    assert [file.relative_to(folder).as_posix() for file in got.files] == [
        "10/x.bmp", "9/y.gif", "cat/a.webp", "dog/a.png", "dog/b.JPG",
    ]  # fmt: skip
    assert got.labels == ["10", "9", "cat", "dog", "dog"]
    assert fit_classes(got) == Labels(("10", "9", "cat", "dog"))
    assert fit_classes(got.select([0, 1])).names == ("9", "10")
    assert fit_classes(got).encode(got) == [0, 1, 2, 3, 3]


def test_names_that_are_fractions_are_classes(tmp_path):
    for name in ("1.5", "2.5"):
        save(tmp_path / name / "a.png")
    labels = fit_classes(read_image_classes(tmp_path))
    assert (labels.names, labels.regression) == (("1.5", "2.5"), False)


def test_a_flat_folder_has_no_labels(folder):
    got = read_images(folder / "dog")
    assert ([file.name for file in got.files], got.labels) == (["a.png", "b.JPG"], None)


def test_an_unknown_class_is_named_with_its_image(folder):
    with pytest.raises(
        InputError, match=r"y\.gif: the label '9' is not in the training data, which has '10', 'cat', 'dog'"
    ):
        Labels(("10", "cat", "dog")).encode(read_image_classes(folder))


def test_a_single_class_is_refused(folder):
    with pytest.raises(InputError, match="there is only the class 'dog'; add a folder"):
        fit_classes(read_image_classes(folder).select([3, 4]))


def test_a_tenth_is_split_off_by_class(folder):
    for i in range(40):
        save(folder / "cat" / f"{i}.png")
        save(folder / "dog" / f"{i}.png")
    images = read_image_classes(folder)
    rest, dev = split_stratified(images, Labels(("10", "9", "cat", "dog")).encode(images), seed=1)
    assert sorted(set(rest.labels)) == ["10", "9", "cat", "dog"]
    assert (dev.labels.count("cat"), dev.labels.count("dog")) == (4, 4)
    assert sorted([*rest.files, *dev.files]) == sorted(images.files)
    with pytest.raises(InputError, match="5 images are too few to split a dev set off; pass a dev folder"):
        split_stratified(images.select(range(5)), [0, 1, 2, 3, 3], seed=1)


def stray_file(folder):
    return save(folder / "stray.png"), "lies beside the folders of the classes; move it into one or remove it"


def empty_class(folder):
    (folder / "ant").mkdir()
    return folder / "ant", "there are no images in it; add some or remove the folder"


def no_image(folder):
    (folder / "cat" / "notes.txt").write_text("x")
    return folder / "cat" / "notes.txt", "is no image by its extension; remove it or convert it"


def folder_in_a_class(folder):
    save(folder / "cat" / "more" / "a.png")
    return folder / "cat" / "more", "is a folder among images; move its images up"


def broken_image(folder):
    (folder / "cat" / "b.png").write_text("this is text")
    return folder / "cat" / "b.png", "the image is broken"


@pytest.mark.parametrize("spoil", [stray_file, empty_class, no_image, folder_in_a_class, broken_image])
def test_what_does_not_belong_there_is_named(folder, spoil):
    path, message = spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        read_image_classes(folder)
    assert str(caught.value).startswith(f"{path}: ")


def test_folders_that_are_none_or_empty(tmp_path, folder):
    with pytest.raises(InputError, match="there is no such folder; check the path"):
        read_image_classes(tmp_path / "none")
    with pytest.raises(InputError, match="this is a file; pass a folder of images"):
        read_images(folder / "dog" / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there are no classes in it; make a folder for each class"):
        read_image_classes(tmp_path / "empty")
    with pytest.raises(InputError, match="there are no images in it; add some"):
        read_images(tmp_path / "empty")
    with pytest.raises(InputError, match="is a folder among images"):
        read_images(folder)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_images_are_opened_as_rgb(tmp_path, mode):
    image = open_image(save(tmp_path / "a.png", mode))
    assert (image.mode, image.size) == ("RGB", (4, 2))


def test_images_are_turned_as_the_camera_was(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation tag: a quarter
    assert open_image(save(tmp_path / "a.jpg", exif=turned)).size == (2, 4)


def test_images_are_opened_when_they_are_asked_for(tmp_path):
    files = [save(tmp_path / f"{i}.png", colour=(i, 0, 0)) for i in range(3)]
    data = ImageDataset(files, processor, [2, 0, 1])
    files[1].write_bytes(files[1].read_bytes()[:40])
    assert data[2]["pixel_values"].flatten().tolist() == [2, 0, 0]
    assert (len(data), data.labels, data.truncated) == (3, [2, 0, 1], 0)
    with pytest.raises(InputError, match=r"1\.png: the image is broken \(.*\); replace or remove it"):
        data[1]
    chosen = data.select([2, 0])
    assert (chosen[0]["labels"], chosen.lengths) == (1, [1, 1])
    batch = stack_batch([data[0], data[2]])
    assert (batch["pixel_values"].shape, batch["labels"].tolist()) == ((2, 3, 1, 1), [2, 1])
    bare = ImageDataset(files, processor)
    assert "labels" not in bare.select([0])[0]
    with pytest.raises(KeyError):
        bare.labels  # noqa: B018


def test_beside_taps_there_is_the_target_and_contents_tell_data_apart(folder):
    images = read_image_classes(folder)
    targets = list(range(len(images)))
    dataset = ImageDataset(images.files, processor, targets)
    assert dataset.beside_taps(1) == {"labels": 1} and ImageDataset(images.files, processor).beside_taps(1) == {}
    assert dataset.digest() == ImageDataset(images.files, processor, targets).digest()
    assert dataset.digest() != ImageDataset(images.files, processor, targets[::-1]).digest()
    before = dataset.digest()
    save(images.files[0], colour=(1, 2, 3))
    assert dataset.digest() != before
