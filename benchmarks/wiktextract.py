"""A synthetic dump in the format of kaikki.org's English Wiktionary, of any size: one JSON object a line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ONSETS = ("b", "ch", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v")
_SYLLABLES = [onset + rhyme for onset in _ONSETS for rhyme in ("a", "e", "i", "o", "u", "ar", "en", "il", "on", "us")]
_WORDS = (
    "any",
    "large",
    "small",
    "kind",
    "of",
    "bird",
    "device",
    "used",
    "for",
    "tree",
    "person",
    "with",
    "long",
    "and",
)
_LANGUAGES = [("Dutch", "nl"), ("French", "fr"), ("German", "de"), ("Polish", "pl"), ("Spanish", "es")]
_POS = ("noun", "noun", "noun", "verb", "adj", "name")


def word(number: int) -> str:
    """The number's word; different numbers have different words, and every eleventh has two parts."""
    parts = []
    rest = number
    while rest or not parts:
        rest, digit = divmod(rest, len(_SYLLABLES))
        parts.append(_SYLLABLES[digit])
    written = "".join(parts)
    return f"{written} {_SYLLABLES[number % len(_SYLLABLES)]}x" if number % 11 == 0 else written


def definition(number: int) -> str:
    """The first definition of the number's word."""
    draw = random.Random(number)
    return f"{' '.join(draw.choices(_WORDS, k=draw.randint(5, 20)))} no. {number}"


def entries() -> Iterator[dict[str, Any]]:
    """Entries without end: for each number its word, and for every third its plural as an entry of its own."""
    number = 0
    while True:
        yield _entry(number)
        if number % 3 == 0:
            yield _plural(number)
        number += 1


def write_dump(path: Path, size: int) -> int:
    """Write entries until the file has `size` bytes; how many numbers have a word in it."""
    written, numbers = 0, 0
    with path.open("wb") as file:
        for entry in entries():
            if written >= size:
                return numbers
            line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            written += len(line)
            numbers += entry["pos"] != "noun" or "form_of" not in entry["senses"][0]
    raise AssertionError("entries() has no end")


def _entry(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    name, pos = word(number), draw.choice(_POS)
    glosses = [definition(number), *(" ".join(draw.choices(_WORDS, k=9)) for _ in range(draw.randint(0, 3)))]
    senses = [
        {
            "links": [[part, part] for part in gloss.split()[:4]],
            "glosses": [gloss],
            "id": f"en-{name}-en-{pos}-{draw.getrandbits(32):08x}",
            "categories": [{"name": "English lemmas", "kind": "other", "parents": [], "source": "w"}],
        }
        for gloss in glosses
    ]
    if len(senses) > 1:
        senses[-1]["tags"] = [draw.choice(["obsolete", "countable", "slang"])]
    return {
        "senses": senses,
        "pos": pos,
        "head_templates": [{"name": f"en-{pos}", "args": {}, "expansion": f"{name} (plural {name}s)"}],
        "forms": [{"form": f"{name}s", "tags": ["plural"]}],
        "etymology_text": "From " + " ".join(draw.choices(_WORDS, k=12)),
        "sounds": [{"ipa": f"/{name}/", "tags": ["Received-Pronunciation"]}],
        "word": name,
        "lang": "English",
        "lang_code": "en",
        "translations": [
            {"lang": lang, "code": code, "word": word(draw.getrandbits(20)), "sense": glosses[0], "tags": ["masculine"]}
            for lang, code in _LANGUAGES * draw.randint(0, 2)
        ],
    }


def _plural(number: int) -> dict[str, Any]:
    name = word(number)
    sense = {"glosses": [f"plural of {name}"], "form_of": [{"word": name}], "tags": ["form-of", "plural"]}
    return {"senses": [sense], "pos": "noun", "word": f"{name}s", "lang": "English", "lang_code": "en"}
