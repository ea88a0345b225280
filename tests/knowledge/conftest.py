"""Dictionaries for the tests: a small WordNet in the real format, and the real one where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.knowledge.small_wordnet import write_wordnet
from tlfast.data import InputError
from tlfast.knowledge import WordNet


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    return WordNet(write_wordnet(tmp_path_factory.mktemp("wordnet")))


@pytest.fixture(scope="session")
def real_wordnet() -> WordNet:
    """WordNet 3.0 from the usual places; skips, with how to get it, where it is not there."""
    try:
        found = WordNet()
    except InputError as error:
        pytest.skip(str(error))
    if found.version != "3.0":
        pytest.skip(f"{found.folder} is WordNet {found.version}; these are checks of 3.0")
    return found


@pytest.fixture(scope="session")
def imagenet(data_folder: Path) -> list[str]:
    """The names of ImageNet's 1,000 classes."""
    path = data_folder / "knowledge" / "imagenet_class_names.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path.read_text(encoding="utf-8").splitlines()
