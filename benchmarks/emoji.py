"""Emoji as three vendors draw them: the same 1,146 things by three hands, with their names.

The drawings are in the npm packages emoji-datasource-{google,twitter,facebook}; npm fetches them (240 MB) into a cache
outside every repository, where only arrays of their pixels stay. Nothing of them is part of tlfast.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pictures import PictureSet, Trial, has_no_seen_word, split_classes, store

VERSION = "16.0.0"
VENDORS = ("google", "twitter", "facebook")  # the last is never trained on
_SIZE = 64  # pixels, as the packages have them
_NO_THINGS = {"Flags", "Symbols", "Component"}
_SECONDS = 600  # for one package
_DEV_SEED = 100


class CannotFetch(Exception):
    """The drawings are not in the cache, and why npm does not bring them."""


def cache_folder() -> Path:
    """$TLFAST_CACHE, else tlfast in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("TLFAST_CACHE") or base / "tlfast") / f"emoji-{VERSION}"


def load() -> PictureSet:
    """Most classes as two vendors draw them to train on; the other classes, and the third vendor, are asked for.

    Raises CannotFetch.
    """
    pictures, labels, vendors, names = _read_all()
    seen, unseen = split_classes(range(len(names)))
    is_unseen, own_hand = torch.isin(labels, unseen), vendors < 2
    new_word = has_no_seen_word(names, seen.tolist())[labels]

    def rows(chosen: torch.Tensor) -> torch.Tensor:
        return chosen.nonzero().flatten()

    trials = {
        "unseen classes": Trial(rows(is_unseen & own_hand), unseen),
        "unseen classes without a word of seen names": Trial(rows(is_unseen & own_hand & new_word), unseen),
        "unseen classes, unseen vendor": Trial(rows(is_unseen & ~own_hand), unseen),
        "seen classes, unseen vendor": Trial(rows(~is_unseen & ~own_hand), seen),
    }
    return PictureSet(pictures, labels, names, seen, rows(~is_unseen & own_hand), trials)


def load_dev(fold: int = 0) -> PictureSet:
    """What settings are chosen by: as many of the seen classes are held out, and nothing of the test is in it.

    Neither the unseen classes nor the third vendor's drawings. Raises CannotFetch.
    """
    pictures, labels, vendors, names = _read_all()
    seen, _ = split_classes(range(len(names)))
    seen, held_out = split_classes(seen.tolist(), _DEV_SEED + fold)
    own_hand = vendors < 2
    trials = {"dev classes": Trial((torch.isin(labels, held_out) & own_hand).nonzero().flatten(), held_out)}
    training = (torch.isin(labels, seen) & own_hand).nonzero().flatten()
    return PictureSet(pictures, labels, names, seen, training, trials)


def _read_all() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[tuple[str, ...], ...]]:
    """Pictures, their labels, their vendors' numbers, and the classes' names."""
    folder = cache_folder()
    pictures, names = [], []
    for vendor in VENDORS:
        if not (folder / f"{vendor}.npz").is_file():
            _fetch(vendor, folder)
        with np.load(folder / f"{vendor}.npz") as file:
            pictures.append(store(torch.from_numpy(file["images"])))
            names.append(tuple(tuple(line.split("\n")) for line in file["names"].tolist()))
    assert names[0] == names[1] == names[2]
    classes = len(names[0])
    vendors = torch.arange(len(VENDORS)).repeat_interleave(classes)
    return torch.cat(pictures), torch.arange(classes).repeat(len(VENDORS)), vendors, names[0]


def _fetch(vendor: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise CannotFetch(f"the emoji of {vendor} are not in {folder}, and npm, which fetches them, is not installed")
    package = f"emoji-datasource-{vendor}@{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [npm, "pack", package, "--silent", "--ignore-scripts"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise CannotFetch(f"npm did not fetch {package} in {_SECONDS} s") from None
        archives = list(Path(work).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            said = " ".join(done.stderr.split())[-300:] or "it wrote nothing"
            raise CannotFetch(f"npm cannot fetch {package}: {said}")
        images, names = _read(archives[0], vendor)
        whole = Path(work) / f"{vendor}.npz"
        np.savez(whole, images=images, names=np.array(["\n".join(name) for name in names]))
        whole.replace(folder / whole.name)


def _read(archive: Path, vendor: str) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    from PIL import Image

    with tarfile.open(archive) as package:
        files = {Path(member.name).name: member for member in package if f"/img/{vendor}/{_SIZE}/" in member.name}
        entries = [entry for entry in json.load(_open(package, "package/emoji.json")) if _is_thing(entry)]
        images = np.empty((len(entries), 4, _SIZE, _SIZE), np.uint8)
        for number, entry in enumerate(entries):
            drawing = Image.open(io.BytesIO(_open(package, files[entry["image"]]).read())).convert("RGBA")
            images[number] = np.asarray(drawing.resize((_SIZE, _SIZE))).transpose(2, 0, 1)
    return images, [_names(entry) for entry in entries]


def _open(package: tarfile.TarFile, member: Any) -> Any:
    return package.extractfile(member)


def _is_thing(entry: dict[str, Any]) -> bool:
    """Drawn by all vendors and told apart by its name: no flag, symbol, skin tone, hour of a clock, or person in a
    sequence that only says sex or hair."""
    drawn = all(entry[f"has_img_{vendor}"] for vendor in VENDORS)
    person_in_sequence = entry["category"] == "People & Body" and "200D" in entry["unified"]
    hour = entry["short_name"].startswith("clock")
    return drawn and entry["category"] not in _NO_THINGS and not person_in_sequence and not hour


def _names(entry: dict[str, Any]) -> tuple[str, ...]:
    """The Unicode name, and the package's short ones."""
    spoken = [entry["name"].lower(), *(name.replace("_", " ").replace("-", " ") for name in entry["short_names"])]
    return tuple(dict.fromkeys(spoken))
