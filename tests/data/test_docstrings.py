"""The demo's corpus: what is read from sources, and that nothing leaks between the splits."""

import re
from collections import Counter

import pytest

from tlfast.data import InputError
from tlfast.data.docstrings import (
    MAX_WORDS,
    MIN_WORDS,
    load_corpus,
    package_roots,
    prose,
    read_passages,
)

SENTENCE = "Return the element that stands at this place in the list."


def texts(source):
    return [passage.text for passage in read_passages(source.encode(), "python", "m.py")]


def test_reads_modules_classes_functions_and_coroutines():
    docs = [f"{SENTENCE} Number {word}." for word in ("one", "two", "three", "four")]
    source = (
        f'"""{docs[0]}"""\nclass A:\n    """{docs[1]}"""\n    def f(self):\n        """{docs[2]}"""\n'
        f'async def g():\n    """{docs[3]}"""\n'
    )
    assert sorted(texts(source)) == sorted(docs)


@pytest.mark.parametrize(
    "call",
    [
        'add_newdoc("numpy._core", "array", """\n    {}\n    """)',
        'torch._C._add_docstr("x")\nadd_docstr(torch.abs, r"""\nabs(input) -> Tensor\n\n{}\n""")',
        'add_docstr(torch.abs, r"""\n{}\n\nArgs:\n    {{x}}\n""".format(x=1))',
    ],
)
def test_reads_docstrings_attached_to_compiled_functions(call):
    assert texts(call.format(SENTENCE)) == [SENTENCE]


def test_other_strings_and_unparsable_files_give_nothing():
    assert texts(f'x = """{SENTENCE}\n"""\nprint("""{SENTENCE}\n""")') == []
    assert texts("def broken(:\n") == []


def test_invalid_escapes_in_sources_do_not_warn(recwarn):
    assert texts(f'"""{SENTENCE}"""\nx = "\\d"') == [SENTENCE]
    assert not recwarn.list


@pytest.mark.parametrize(
    "paragraph",
    [
        "x : array_like\n    The elements that are to be put into the list at once.",
        "Parameters that this function takes, in their order\n---------------------",
        ">>> print('a line of an example is no prose at all')",
        ".. note:: this is what a directive of Sphinx looks like here",
        "function_name(first, second, third, fourth, fifth, sixth, seventh, eighth) -> Tensor",
        "Too short to be read.",
        "numpy torch python numpy torch python numpy torch python",  # nothing is left once the names are masked
    ],
)
def test_what_is_not_prose_is_left_out(paragraph):
    assert prose(f"{paragraph}\n\n{SENTENCE}") == SENTENCE


def test_a_docstring_without_prose_gives_nothing():
    assert prose("Too short.") == prose("") == ""


def test_names_are_masked_in_every_form():
    text = (
        "Like np.add, numpy.ndarray, PyTorch, `__torch_function__`, libtorch, CPython 3 and Python's own for "
        "an :class:`~torch.nn.Module` or :py:func:`the sum <numpy.sum>`, an input and a snapshot of it."
    )
    assert prose(text) == (
        "Like package.add, package.ndarray, package, `package`, package, package 3 and package's own for "
        "an package.nn.Module or the sum, an input and a snapshot of it."
    )


def test_paragraphs_are_joined_on_one_line_and_cut():
    text = prose(f"{SENTENCE}\n\n" + "\n".join(["several words stand in every line"] * 20))
    assert text.startswith(f"{SENTENCE} several words")
    assert len(text.split()) == MAX_WORDS
    assert "\n" not in text and "\t" not in text


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(train=120, dev=30, test=60, seed=0)


def test_splits_are_balanced_and_of_the_asked_sizes(corpus):
    for split, count in ((corpus.train, 120), (corpus.dev, 30), (corpus.test, 60)):
        assert Counter(passage.label for passage in split) == dict.fromkeys(("python", "numpy", "torch"), count)


def test_no_module_and_no_text_is_in_two_splits(corpus):
    splits = (corpus.train, corpus.dev, corpus.test)
    everything = [passage for split in splits for passage in split]
    assert len({passage.text.lower() for passage in everything}) == len(everything)
    modules = [{(passage.label, passage.module) for passage in split} for split in splits]
    assert sum(map(len, modules)) == len(set.union(*modules))
    assert min(map(len, modules)) > 3  # several modules of each package


def test_installed_texts_are_prose_without_names(corpus):
    for passage in corpus.train + corpus.dev + corpus.test:
        assert not any(name in passage.text.lower() for name in ("numpy", "torch", "python"))
        assert len(re.findall("[A-Za-z]{2,}", passage.text)) >= MIN_WORDS
        assert len(passage.text.split()) <= MAX_WORDS


def numbered(count, salt):
    letters = [f"{salt}{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(count)]
    return "\n".join(f'def f{i}():\n    """{SENTENCE} Called {name} here."""' for i, name in enumerate(letters))


@pytest.fixture
def sources(tmp_path):
    """Two packages of small modules; the second has fewer."""
    for label, modules in (("large", 40), ("small", 12)):
        (tmp_path / label / "tests").mkdir(parents=True)
        for i in range(modules):
            (tmp_path / label / f"m{i}.py").write_text(numbered(5, f"{label}{chr(97 + i % 26)}{chr(97 + i // 26)}"))
        (tmp_path / label / "tests" / "m.py").write_text(numbered(50, f"{label}test"))
    return {label: tmp_path / label for label in ("large", "small")}


def test_the_seed_decides(sources):
    def corpus(seed):
        return load_corpus(train=20, dev=5, test=10, seed=seed, roots=sources)

    assert corpus(0) == corpus(0)
    assert corpus(0) != corpus(1)


def test_training_shrinks_to_the_smallest_package(sources):
    corpus = load_corpus(train=100, dev=10, test=20, roots=sources)
    assert Counter(passage.label for passage in corpus.test) == {"large": 20, "small": 20}
    assert Counter(passage.label for passage in corpus.dev) == {"large": 10, "small": 10}
    assert Counter(passage.label for passage in corpus.train) == {"large": 30, "small": 30}  # 12 * 5 - 30
    assert not any(passage.module.startswith("tests/") for passage in corpus.train)


def test_a_package_without_enough_text_is_refused(sources):
    with pytest.raises(InputError, match="small: too little prose about small for dev and test"):
        load_corpus(train=100, dev=30, test=30, roots=sources)


def test_a_text_in_two_packages_is_used_once(sources):
    (sources["small"] / "m0.py").write_text((sources["large"] / "m0.py").read_text())
    corpus = load_corpus(train=200, dev=5, test=5, roots=sources)
    everything = [passage.text for split in (corpus.train, corpus.dev, corpus.test) for passage in split]
    assert len(set(everything)) == len(everything)


def test_texts_are_spread_over_all_modules(tmp_path):
    for i in range(10):
        (tmp_path / f"m{i}.py").write_text(numbered(100, f"m{chr(97 + i)}"))
    corpus = load_corpus(train=20, dev=4, test=8, roots={"x": tmp_path})
    everything = corpus.train + corpus.dev + corpus.test
    assert set(Counter(passage.module for passage in everything).values()) <= {1, 2, 3, 4}
    assert len({passage.module for passage in everything}) >= 8


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"docstrings of numpy .* not installed; install it"):
        package_roots()
