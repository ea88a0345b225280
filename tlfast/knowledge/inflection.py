"""Base forms of inflected English words, by the rules of WordNet's Morphy (morphy(7WN)) and its lists of exceptions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# suffix and what stands for it in the base form, in the order they are tried
RULES = {
    "n": (
        ("ches", "ch"),
        ("shes", "sh"),
        ("ses", "s"),
        ("xes", "x"),
        ("zes", "z"),
        ("men", "man"),
        ("ies", "y"),
        ("s", ""),
    ),
    "v": (("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""), ("s", "")),
    "a": (("est", ""), ("est", "e"), ("er", ""), ("er", "e")),
    "r": (),
}
_SHORTEST = 2  # letters of a base form


def base_forms(form: str, pos: str, exceptions: Mapping[str, tuple[str, ...]] | None = None) -> Iterator[str]:
    """Candidates for the base form of a folded name, best first; not all of them are words.

    Of several words the last is inflected ("oil filters"), or each ("attorneys general").
    exceptions: inflected form -> base forms, which keep the rules from being tried, as in Morphy.
    """
    exceptions = exceptions or {}
    yield from exceptions.get(form, ())
    *before, last = form.split(" ")
    for base in _of_word(last, pos, exceptions):
        yield " ".join([*before, base])
    if pos == "n":
        bases = [next(_of_word(word, pos, exceptions), word) for word in before]
        if bases != before:
            yield " ".join([*bases, last])
            for base in _of_word(last, pos, exceptions):
                yield " ".join([*bases, base])


def _of_word(word: str, pos: str, exceptions: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if word in exceptions:
        yield from exceptions[word]
        return
    stem, full = (word[:-3], "ful") if pos == "n" and word.endswith("ful") else (word, "")
    if pos == "n" and stem.endswith("ss"):
        return
    for suffix, replacement in RULES[pos]:
        if stem.endswith(suffix):
            base = stem.removesuffix(suffix) + replacement
            if len(base) >= _SHORTEST:
                yield base + full
