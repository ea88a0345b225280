"""Which packages the zero-shot demo tells apart, and that none of their names is left in its texts."""

import importlib.metadata
import importlib.util

import pytest

from tlfast.data import InputError, packages
from tlfast.data.docstrings import load_corpus, prose

SENTENCE = "Return the element that stands at this place in the list."


@pytest.fixture(scope="module")
def families():
    return packages.installed_families()


def test_each_has_sources_and_its_own_summary(families):
    named = {family.name: family for family in families}
    assert named[packages.STANDARD_LIBRARY].summary is None
    assert named["NumPy"].summary == importlib.metadata.metadata("numpy")["Summary"]
    assert all(family.root.is_dir() for family in families)
    assert all(family.summary is None or "\n" not in family.summary for family in families)


def test_what_is_not_installed_is_left_out(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else find_spec(name))
    assert "SciPy" not in [family.name for family in packages.installed_families()]


def test_the_standard_library_alone_is_not_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "package_roots", lambda: {"python": tmp_path})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"none of the packages .* is installed; run pip install"):
        packages.installed_families()


@pytest.mark.parametrize("summary", [None, "", "UNKNOWN"])
def test_a_package_may_say_nothing_of_itself(monkeypatch, summary):
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: {"Summary": summary})
    assert all(family.summary is None for family in packages.installed_families())


def test_names_are_masked():
    text = "It is for scikit-learn, sklearn.svm, `plt.plot`, nx.Graph, HuggingFace, fontTools.ttLib and Transformers."
    assert prose(text, packages.MASKED) == (
        "It is for package-learn, package.svm, `package.plot`, package.Graph, package, package.package and package."
    )
    assert prose(f"{SENTENCE} A transformer layer.", packages.MASKED) == f"{SENTENCE} A transformer layer."


def test_no_name_is_left_in_the_texts_of_any(families):
    roots = {family.name: family.root for family in families}
    corpus = load_corpus(train=5, dev=0, test=10, roots=roots, masked=packages.MASKED, files=40)
    assert len(corpus.test) == 10 * len(families)
    for passage in corpus.train + corpus.test:
        assert not packages.MASKED.search(passage.text)
