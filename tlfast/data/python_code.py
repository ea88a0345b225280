"""A graph that every installation holds: the modules, classes, functions and words of installed Python packages.

Sources are parsed, never imported. The names of the packages are left out wherever they stand.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError

FAMILIES = ("python", "numpy", "torch", "transformers", "sklearn", "matplotlib")
WIDTHS = {"module": 128, "class": 128, "function": 256, "word": 128}
MOST_WORDS, FEWEST_FUNCTIONS = 6000, 3  # words in the graph; functions that a word must be in

_GIVEN_AWAY = re.compile(
    r"python|numpy|torch|transformers|sklearn|matplotlib|scikit|^(np|plt|mpl|aten|hf)$", re.IGNORECASE
)
_SKIPPED = {"test", "tests", "testing", "site-packages", "dist-packages", "_vendor", "idlelib", "lib2to3"}
_PART = re.compile(r"[A-Z]{3,}(?![a-z])|[A-Z]?[a-z]{2,}")
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class CodeGraph:
    """What `read_code` found; nodes of a type are numbered in the order of names[type].

    edges: {(source type, relation, target type): (2, E) int64}, each relation both ways. x: (nodes, WIDTHS[type])
    float32 with rows of length 1 or 0. family: place in `families` of each module, class and function. module: the
    module each of them is in.
    """

    families: tuple[str, ...]
    names: dict[str, list[str]]
    edges: dict[tuple[str, str, str], np.ndarray]
    x: dict[str, np.ndarray]
    family: dict[str, np.ndarray]
    module: dict[str, np.ndarray]


def package_folders(families: Iterable[str] = FAMILIES) -> dict[str, Path]:
    """Where the sources of the packages are; InputError where one is not installed."""
    folders = {}
    for name in families:
        spec = None if name == "python" else importlib.util.find_spec(name)
        if name == "python":
            folders[name] = Path(sysconfig.get_paths()["stdlib"])
        elif spec is None or spec.origin is None:
            raise InputError(f"the sources of {name} are part of the graph and it is not installed; install it")
        else:
            folders[name] = Path(spec.origin).parent
    return folders


def read_code(files: int = 120, seed: int = 0, folders: Mapping[str, Path] | None = None) -> CodeGraph:
    """The graph of at most `files` source files of each package, drawn by the seed.

    A module defines its classes and functions, a class has its methods, a function mentions the words of its name, its
    arguments and its docstring. Features are hashed counts, each type's its own: imported names of a module, bases and
    attributes of a class, names in the body of a function, groups of three letters of a word.
    Raises InputError where a package has no file with a function.
    """
    folders = package_folders() if folders is None else folders
    code = _Code(tuple(folders))
    for label, folder in enumerate(folders.values()):
        before = len(code.names["function"])
        for path in _drawn(folder, files, f"{seed} {label}"):
            tree = _parsed(folder / path)
            if tree is not None:
                code.add_module(f"{code.families[label]}/{path.as_posix()}", tree, label)
        if len(code.names["function"]) == before:
            raise InputError(f"{folder}: has no source file with a function; is the package whole?")
    return code.graph()


def words_of(text: str) -> list[str]:
    """The lower-case words of identifiers and prose, without what names a package."""
    return [part.lower() for part in _PART.findall(text) if len(part) > 2 and not _GIVEN_AWAY.search(part)]


class _Code:
    """A graph that grows a module at a time."""

    def __init__(self, families: tuple[str, ...]) -> None:
        self.families = families
        self.names: dict[str, list[str]] = {"module": [], "class": [], "function": []}
        self._family: dict[str, list[int]] = {t: [] for t in self.names}
        self._module: dict[str, list[int]] = {t: [] for t in self.names}
        self._tokens: dict[str, list[Counter[str]]] = {t: [] for t in self.names}
        self._words: list[list[str]] = []  # of each function
        self._links: dict[tuple[str, str, str], list[tuple[int, int]]] = {
            ("module", "defines", "class"): [],
            ("module", "defines", "function"): [],
            ("class", "has", "function"): [],
        }

    def add_module(self, name: str, tree: ast.Module, label: int) -> None:
        """A module with functions; one without any is left out."""
        top = [node for node in tree.body if isinstance(node, (*_Function, ast.ClassDef))]
        if not any(isinstance(node, _Function) or _methods(node) for node in top):
            return
        module = self._add("module", name, label, len(self.names["module"]), _imports(tree))
        for node in top:
            if isinstance(node, _Function):
                self._add_function(name, node, label, module, ("module", "defines", "function"), module)
            elif isinstance(node, ast.ClassDef):
                place = self._add("class", f"{name}:{node.name}", label, module, _class_tokens(node))
                self._links["module", "defines", "class"].append((module, place))
                for method in _methods(node):
                    self._add_function(
                        f"{name}:{node.name}", method, label, module, ("class", "has", "function"), place
                    )

    def graph(self) -> CodeGraph:
        """All of it, with the words that enough functions mention."""
        counts = Counter(word for words in self._words for word in set(words))
        common = [word for word, count in counts.most_common(MOST_WORDS) if count >= FEWEST_FUNCTIONS]
        place = {word: i for i, word in enumerate(common)}
        mentions = [(i, place[w]) for i, words in enumerate(self._words) for w in sorted(set(words)) if w in place]
        edges: dict[tuple[str, str, str], np.ndarray] = {}
        for (source, name, target), pairs in {**self._links, ("function", "mentions", "word"): mentions}.items():
            array = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T.copy()
            edges[source, name, target], edges[target, f"rev_{name}", source] = array, array[::-1].copy()
        tokens = self._tokens | {"word": [Counter(_letters(word)) for word in common]}
        return CodeGraph(
            self.families,
            self.names | {"word": common},
            edges,
            {t: _hashed(t, counted) for t, counted in tokens.items()},
            {t: np.asarray(labels, dtype=np.int64) for t, labels in self._family.items()},
            {t: np.asarray(modules, dtype=np.int64) for t, modules in self._module.items()},
        )

    def _add(self, kind: str, name: str, label: int, module: int, tokens: Iterable[str]) -> int:
        self.names[kind].append(name)
        self._family[kind].append(label)
        self._module[kind].append(module)
        self._tokens[kind].append(Counter(token for token in tokens if not _GIVEN_AWAY.search(token)))
        return len(self.names[kind]) - 1

    def _add_function(
        self, owner: str, node: ast.AST, label: int, module: int, relation: tuple[str, str, str], place: int
    ) -> None:
        assert isinstance(node, _Function)
        function = self._add("function", f"{owner}:{node.name}", label, module, _names(node))
        arguments = [argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
        said = [node.name, *arguments, ast.get_docstring(node, clean=False) or ""]
        self._words.append(words_of(" ".join(said)))
        self._links[relation].append((place, function))


def _drawn(folder: Path, files: int, seed: str) -> list[Path]:
    """Source files in an order drawn by the seed, relative to the folder."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    found = [path for path in found if _SKIPPED.isdisjoint(path.parts)]
    return random.Random(seed).sample(found, min(len(found), files))


def _parsed(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deep
            return None  # unreadable, a template, or a file for another Python version


def _methods(node: ast.AST) -> list[ast.AST]:
    return [child for child in node.body if isinstance(child, _Function)] if isinstance(node, ast.ClassDef) else []


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (name.name for name in node.names)
            if isinstance(node, ast.ImportFrom) and node.module:
                yield node.module


def _class_tokens(node: ast.ClassDef) -> Iterator[str]:
    """Names of the bases and the decorators, and attributes that are set."""
    for part in (*node.bases, *node.decorator_list):
        yield from (f"base {name}" for name in _names(part))
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield child.attr


def _names(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr


def _letters(word: str) -> list[str]:
    marked = f"<{word}>"
    return [marked[i : i + 3] for i in range(len(marked) - 2)]


def _hashed(kind: str, counted: list[Counter[str]]) -> np.ndarray:
    """(nodes, WIDTHS[kind]): log(1 + count) added up where a token's hash falls, rows of length 1 or 0."""
    x = np.zeros((len(counted), WIDTHS[kind]), dtype=np.float32)
    for row, tokens in zip(x, counted, strict=True):
        for token, count in tokens.items():
            row[zlib.crc32(f"{kind} {token}".encode()) % len(row)] += np.log1p(count)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)
