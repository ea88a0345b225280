"""WordNet's dict files, as wndb(5WN) describes them: where they are, index lines, synset lines, exceptions."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..data.errors import InputError

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
HINT = (
    "run apt-get install wordnet-base, or unpack WNdb-3.0.tar.gz from https://wordnet.princeton.edu and pass its "
    "folder dict (--wordnet DIR)"
)
_PLACES = (
    "/usr/share/wordnet",
    "/usr/share/wordnet/dict",
    "/usr/local/WordNet-3.0/dict",
    "/usr/local/share/wordnet",
    "/usr/local/share/wordnet/dict",
    "/opt/homebrew/share/wordnet/dict",
    "~/WordNet-3.0/dict",
    "~/nltk_data/corpora/wordnet",
    "/usr/share/nltk_data/corpora/wordnet",
)
_VERSION = re.compile(r"WordNet (\d+\.\d+)")
_SYNTACTIC_MARKER = re.compile(r"\((?:a|p|ip)\)$")
_EXAMPLE = re.compile(r'"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Synset:
    """One line of a data file. words: with blanks, in WordNet's order; parents: part of speech, offset of hypernyms."""

    pos: str
    offset: int
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    parents: tuple[tuple[str, int], ...]


def find_folder(folder: str | Path | None = None) -> Path:
    """The folder with index.noun: `folder`, or the dict/ in it.

    None: the first of $TLFAST_WORDNET, $WNSEARCHDIR, $WNHOME/dict and the usual places.

    Raises InputError, with how to get WordNet, where it is not there.
    """
    if folder is not None:
        found = _with_files(Path(folder).expanduser())
        if found is None:
            what = "has no index.noun" if Path(folder).expanduser().is_dir() else "there is no such folder"
            raise InputError(f"WordNet in {str(folder)!r}: {what}; {HINT}")
        return found
    home = os.environ.get("WNHOME")
    named = [os.environ.get("TLFAST_WORDNET"), os.environ.get("WNSEARCHDIR"), home and f"{home}/dict"]
    for place in (*filter(None, named), *_PLACES):
        if found := _with_files(Path(place).expanduser()):
            return found
    raise InputError(f"WordNet is in none of the usual places; {HINT}")


def _with_files(folder: Path) -> Path | None:
    return next((place for place in (folder, folder / "dict") if (place / "index.noun").is_file()), None)


def read_index(path: Path) -> tuple[dict[str, str], str | None]:
    """Lemma, as the file spells it -> the rest of its line; and the version that the licence names, if any."""
    text = _read(path)
    header, body = _split_header(text)
    version = _VERSION.search(header)
    try:
        index = dict(line.split(" ", 1) for line in body.splitlines())
    except ValueError:
        lines = body.splitlines()
        number = next(i for i, line in enumerate(lines, 1) if " " not in line) + header.count("\n")
        raise InputError(f"{path}, line {number}: is no line of a WordNet index; install WordNet again") from None
    if not index:
        raise InputError(f"{path}: has no words; install WordNet again")
    return index, version and version[1]


def _split_header(text: str) -> tuple[str, str]:
    """The licence, whose lines begin with two blanks, and the rest."""
    start = 0
    while text.startswith("  ", start):
        end = text.find("\n", start)
        start = len(text) if end < 0 else end + 1
    return text[:start], text[start:]


def parse_offsets(rest: str) -> list[int]:
    """The synset offsets of an index line, in order of sense number: how often each sense is used in tagged texts.

    rest: pos synset_cnt p_cnt [ptr_symbol ...] sense_cnt tagsense_cnt synset_offset [synset_offset ...].
    Raises ValueError or IndexError for another form.
    """
    fields = rest.split()
    first = 5 + int(fields[2])
    if len(fields) != first + int(fields[1]):
        raise ValueError("the line has not as many offsets as it says")
    return [int(offset) for offset in fields[first:]]


def read_exceptions(path: Path) -> dict[str, tuple[str, ...]]:
    """Inflected form -> base forms, with blanks; empty where there is no such file."""
    if not path.is_file():
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for line in _read(path).splitlines():
        form, *bases = (word.replace("_", " ") for word in line.split()) if line.strip() else ("",)
        found[form] = (*found.get(form, ()), *bases)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; {HINT}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend it or install WordNet again") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; WordNet's files are plain ASCII: install it again"
        ) from None


class DataFile:
    """A data file, mapped into memory and read a synset at a time."""

    def __init__(self, path: Path, pos: str) -> None:
        self.path, self.pos = path, pos
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InputError(f"{path}: there is no such file; {HINT}") from None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise InputError(f"{path}: cannot be read ({error}); install WordNet again") from None

    def synset(self, offset: int) -> Synset:
        """The synset whose line begins at a byte offset; InputError where none does."""
        if self._bytes[offset : offset + 9] != b"%08d " % offset:
            raise InputError(
                f"{self.path}: no synset begins at byte {offset}; either the number is of another WordNet version, or "
                "the files are (or their line ends were changed): install WordNet 3.0 again"
            )
        line = self._bytes[offset : self._bytes.find(b"\n", offset)]
        try:
            return _parse_synset(line.decode("utf-8"), self.pos)
        except (ValueError, IndexError) as error:  # a UnicodeDecodeError is a ValueError, too
            raise InputError(
                f"{self.path}: the synset at byte {offset} is malformed ({error}); install WordNet again"
            ) from None


def _parse_synset(line: str, pos: str) -> Synset:
    """offset lex_filenum ss_type w_cnt word lex_id [...] p_cnt [symbol offset pos source/target ...] | gloss"""
    fields, _, gloss = line.partition(" | ")
    parts = fields.split(" ")
    count = int(parts[3], 16)
    words = tuple(word.replace("_", " ") for word in parts[4 : 4 + 2 * count : 2])
    if pos == "a":
        words = tuple(_SYNTACTIC_MARKER.sub("", word) for word in words)
    first = 5 + 2 * count
    pointers = range(first, first + 4 * int(parts[first - 1]), 4)
    parents = tuple((parts[i + 2], int(parts[i + 1])) for i in pointers if parts[i] in ("@", "@i"))
    definition, examples = _split_gloss(gloss)
    return Synset(pos, int(parts[0]), words, definition, examples, parents)


def _split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """Definition and examples: these are in quotes, at the end, behind a semicolon."""
    gloss = gloss.strip()
    at = gloss.find('; "')
    if at < 0:
        return gloss.rstrip("; "), ()
    return gloss[:at].rstrip("; "), tuple(_EXAMPLE.findall(gloss[at:]))
