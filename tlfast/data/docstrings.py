"""A reading task that every installation holds: which package does this docstring document?

The texts are the prose of the docstrings of Python's standard library, NumPy and PyTorch as installed.
Sources are parsed, never imported. Package names are masked, so that the answer has to be read from what is said.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import random
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import InputError

MASK = "package"
MIN_WORDS, MAX_WORDS = 8, 90  # of a paragraph; of a text
MAX_FILES = 500  # of a package; reading all of PyTorch would take longer than training on it

# Any identifier that holds a package's name, and the short names that give one away.
NAMES = re.compile(r"\w*(?:python|numpy|torch)\w*|\b(?:np|aten|c10d?)\b", re.IGNORECASE)
_ROLE = re.compile(r":\w+(?::\w+)?:`~?([^`<]*?)\s*(?:<[^`]*>)?`")  # :class:`~a.B` is read as a.B
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(?:\s*->.*)?")
# Indented lines are lists of arguments or code; the others are headings, examples and directives.
_NOT_PROSE = re.compile(r"^\s|^[-=~^]{3,}|^>>>|^\.\. ", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ATTACHED = ("add_newdoc", "add_docstr")  # how NumPy and PyTorch document what is written in C
_SKIPPED = {"test", "tests", "testing", "site-packages", "dist-packages", "_vendor", "idlelib", "lib2to3"}


class Passage(NamedTuple):
    """text: one line, package names masked. label: the package. module: the file it stands in, relative to it."""

    text: str
    label: str
    module: str


@dataclass(frozen=True)
class Corpus:
    """Three splits with as many texts of each package; no module is in two of them and no text occurs twice."""

    train: list[Passage]
    dev: list[Passage]
    test: list[Passage]


def package_roots() -> dict[str, Path]:
    """Where the sources of the three packages are.

    Raises InputError where one is not installed.
    """
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for name in ("numpy", "torch"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InputError(f"the docstrings of {name} are part of the corpus and it is not installed; install it")
        roots[name] = Path(spec.origin).parent
    return roots


def load_corpus(
    train: int = 800,
    dev: int = 200,
    test: int = 400,
    seed: int = 0,
    roots: Mapping[str, Path] | None = None,
    masked: re.Pattern[str] = NAMES,
    files: int = MAX_FILES,
) -> Corpus:
    """Build the corpus from what is installed; the same versions and seed give the same texts in the same order.

    train, dev, test: texts of each package, spread over as many files as it has, so that what is learned is about the
        package and not about a few of its files. Where a package has too few, training shrinks for all, so that the
        classes stay balanced; dev and test never do.
    roots: label -> folder of sources; None takes `package_roots()`. masked: what in a text gives its package away.
    files: of a package that are read at most.
    Raises InputError where a package leaves nothing to train on.
    """
    roots = package_roots() if roots is None else roots
    seen: set[str] = set()
    split: dict[str, list[list[Passage]]] = {"test": [], "dev": [], "train": []}
    for label, root in roots.items():
        modules = _thinned(_modules(label, root, seed, seen, masked, files), train + dev + test)
        for name, count in (("test", test), ("dev", dev), ("train", train)):
            split[name].append(_take(modules, count))
        if not split["train"][-1]:
            raise InputError(f"{root}: too little prose about {label} for dev and test; is the package whole?")
    smallest = min(map(len, split["train"]))
    split["train"] = [texts[:smallest] for texts in split["train"]]
    return Corpus(**{name: _mixed(classes, seed) for name, classes in split.items()})


def read_passages(source: bytes, label: str, module: str, masked: re.Pattern[str] = NAMES) -> list[Passage]:
    """The prose of each docstring in one source file, in its order; [] if the file cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []  # a template or a file for another Python version
    attached = any(name.encode() in source for name in _ATTACHED)
    docstrings = filter(None, map(_docstring, ast.walk(tree) if attached else _statements(tree)))
    texts = filter(None, (prose(docstring, masked) for docstring in docstrings))
    return [Passage(text, label, module) for text in texts]


def prose(docstring: str, masked: re.Pattern[str] = NAMES) -> str:
    """Its paragraphs of prose of MIN_WORDS words at least, on one line, cut to MAX_WORDS; "" without any.

    What `masked` matches is replaced by MASK.
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if _NOT_PROSE.search(paragraph):
            continue
        text = " ".join(_ROLE.sub(r"\1", paragraph).split())
        if _SIGNATURE.fullmatch(text):
            continue
        text = masked.sub(MASK, text)
        if len(_WORD.findall(text.replace(MASK, ""))) >= MIN_WORDS:
            paragraphs.append(text)
    return " ".join(" ".join(paragraphs).split()[:MAX_WORDS])


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What a module, class or function may stand in, in the order of ast.walk: no expressions, most of a tree."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, name, ())
            if isinstance(children, list):
                waiting.extend(children)
        yield node


def _docstring(node: ast.AST) -> str | None:
    if isinstance(node, _DOCUMENTED):
        return ast.get_docstring(node, clean=False)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _ATTACHED:
        strings = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))
        return next((text for text in strings if "\n" in text), None)  # the other strings are names
    return None


def _modules(
    label: str, root: Path, seed: int, seen: set[str], masked: re.Pattern[str], most: int
) -> list[list[Passage]]:
    """Each source file's texts that are not in `seen`, which grows; files and texts in an order drawn by the seed."""
    rng = random.Random(f"{seed} {label}")
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [path for path in files if _SKIPPED.isdisjoint(path.parts)]
    modules = []
    for path in rng.sample(files, min(len(files), most)):
        fresh = []
        for passage in read_passages((root / path).read_bytes(), label, path.as_posix(), masked):
            key = " ".join(_WORD.findall(passage.text.lower()))
            if key not in seen:
                seen.add(key)
                fresh.append(passage)
        rng.shuffle(fresh)
        modules.append(fresh)
    return modules


def _thinned(modules: list[list[Passage]], count: int) -> Iterator[list[Passage]]:
    """The modules cut to the least common length that still gives `count` texts and what two uses of `_take` drop."""
    longest = max(map(len, modules), default=0)
    for most in range(1, longest):
        if sum(min(len(module), most) for module in modules) >= count + 2 * most:
            return (module[:most] for module in modules)
    return iter(modules)


def _take(modules: Iterator[list[Passage]], count: int) -> list[Passage]:
    """Whole modules until there are `count` texts; what the last one has beyond that is dropped, not passed on."""
    taken: list[Passage] = []
    while len(taken) < count and (module := next(modules, None)) is not None:
        taken += module
    return taken[:count]


def _mixed(classes: list[list[Passage]], seed: int) -> list[Passage]:
    texts = [passage for passages in classes for passage in passages]
    random.Random(seed).shuffle(texts)
    return texts
