"""The dictionaries and class names that a command is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError, read_examples
from ..data.lines import read_lines
from ..data.write import TABLES
from .output import note, on_terminal

if TYPE_CHECKING:
    from ..knowledge import Dictionary, Wiktionary

USUAL_PLACES = "auto"

WordNetFolder = Annotated[
    str | None,
    typer.Option(
        "--wordnet",
        help='Folder of WordNet\'s dict files, or "auto": the usual places; the default where no dictionary is named.',
    ),
]
WiktionaryDump = Annotated[
    Path | None,
    typer.Option(
        "--wiktionary", help="A wiktextract dump (.jsonl, .jsonl.gz), indexed at its first use; or its .sqlite index."
    ),
]
GlossaryFile = Annotated[
    Path | None,
    typer.Option("--glossary", help="Your own .tsv, .csv or .jsonl with the columns name and definition."),
]
ClassFile = Annotated[
    Path,
    typer.Option(
        "--classes",
        help="Class names: .txt, a name a line; .tsv, .csv or .jsonl with a column; or a folder of class folders.",
    ),
]
NameColumn = Annotated[str, typer.Option("--column", help="Name of the column of class names.")]
NoBackOff = Annotated[
    bool, typer.Option("--no-back-off", help="A name that is missing does not take its head noun's senses.")
]


def open_dictionary(wordnet: str | None, wiktionary: Path | None, glossary: Path | None, quiet: bool) -> Dictionary:
    """The dictionaries that were named, as one: a glossary before WordNet before Wiktionary. None: WordNet."""
    from ..knowledge import Dictionaries, Glossary, WordNet

    found: list[Dictionary] = []
    if glossary is not None:
        found.append(Glossary(glossary))
    if wordnet is not None or (wiktionary is None and glossary is None):
        found.append(WordNet(None if wordnet in (None, USUAL_PLACES) else wordnet))
    if wiktionary is not None:
        found.append(_open_wiktionary(wiktionary, quiet))
    return found[0] if len(found) == 1 else Dictionaries(found)


def _open_wiktionary(path: Path, quiet: bool) -> Wiktionary:
    """The index of a dump; behind a progress bar where it has to be made. Ctrl-C ends with status 130."""
    from tqdm import tqdm

    from ..knowledge import Wiktionary

    size = path.stat().st_size if path.suffix == ".jsonl" and path.is_file() else None
    with tqdm(total=size, unit="B", unit_scale=True, delay=1, disable=quiet or not on_terminal()) as bar:
        bar.set_description("indexing")
        try:
            return Wiktionary(path, progress=lambda done: _move(bar, done))
        except KeyboardInterrupt:
            note("interrupted; run the same command to go on")
            raise typer.Exit(130) from None


def _move(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def read_classes(path: Path, column: str) -> list[str]:
    """Class names, in their order. Raises InputError for what the readers refuse and a name that is there twice."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise InputError(f"{path}: there are no folders in it; make one for each class, or pass a file of names")
        return names
    if path.suffix.lower() == ".txt":
        lines = [(number, line.strip()) for number, line in enumerate(read_lines(path, "a class name a line"), 1)]
        rows = [(number, line) for number, line in lines if line]
    elif path.suffix.lower() in TABLES:
        examples = read_examples(path, column, None, pairs=False)
        rows = list(zip(examples.lines, (text.strip() for text in examples.texts), strict=True))
    else:
        raise InputError(f"{path}: the extension {path.suffix!r} is not known; use one of .txt, {', '.join(TABLES)}")
    first: dict[str, int] = {}
    for number, name in rows:
        if name in first:
            raise InputError(f"{path}, line {number}: {name!r} is on line {first[name]} already; keep one")
        first[name] = number
    return list(first)
