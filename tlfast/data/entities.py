"""Entities in BIO tags, by the rules of the CoNLL-2000 evaluation (Tjong Kim Sang and Buchholz 2000, conlleval)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OUTSIDE = "O"

Entity = tuple[int, int, str]


def are_bio(tags: Iterable[str]) -> bool:
    """Whether tags are O, B-type and I-type, at least one of them not O."""
    tags = set(tags)
    return tags != {OUTSIDE} and all(tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2) for tag in tags)


def complete_scheme(tags: Iterable[str]) -> set[str]:
    """BIO tags with B- and I- of every type that occurs, and O; other tags as they are."""
    tags = set(tags)
    if not are_bio(tags):
        return tags
    return {OUTSIDE, *(f"{prefix}-{tag[2:]}" for tag in tags - {OUTSIDE} for prefix in "BI")}


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of one sentence of BIO tags as (first, behind the last, type).

    An I- that does not continue an entity of its type begins one, so that IOB1 is read as well.
    """
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, this = tag[:1], tag[2:]
        if kind and (prefix != "I" or this != kind):
            found.add((start, i, kind))
            kind = ""
        if this and not kind:
            start, kind = i, this
    return found
