"""Which of a name's senses a class has: the first, or the nearest to the other classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .encoding import Encode, embed
from .sense import Match, Sense

CHOICES = ("first", "nearest")

# Chosen with MiniLM-L6 on the 1,000 ImageNet names, whose first 398 must be animals and the next 502 artifacts, and
# on 30 small sets of classes: right for 220 of ImageNet's 236 ambiguous names, against 167 by the first sense.
NEIGHBOURS = 5
PRIOR = 0.02
_HYPERNYMS = 5
_PIECE_BYTES = 64 << 20


def choose_first(matches: Sequence[Match]) -> list[Sense | None]:
    """Each name's first sense, the one its dictionary ranks highest; None for a name without."""
    return [match.senses[0] if match.senses else None for match in matches]


def choose_nearest(
    matches: Sequence[Match], encode: Encode, neighbours: int = NEIGHBOURS, prior: float = PRIOR
) -> list[Sense | None]:
    """Each name's sense whose definition lies closest to the other classes; None for a name without.

    Closeness to a class is the mean of two cosines, of `describe(sense)` with its name and with the closest of its
    definitions; the `neighbours` closest classes count. Among herons a "crane" is a bird, among excavators a machine.
    The dictionary's order counts `prior` (a cosine) for each rank. Only senses with the first one's part of speech
    compete, so that an "orange" found as a noun is no adjective. A set of a single name takes its first sense.
    encode: list[str] -> (N, D), array or tensor. Raises ValueError where it returns something else.
    """
    senses = {match.name: _candidates(match) for match in matches}
    names = list(senses)
    chosen = {name: found[0] if found else None for name, found in senses.items()}
    if len(names) > 1 and any(len(found) > 1 for found in senses.values()):
        for i, close in _closeness(senses, encode):
            found = senses[names[i]]
            others = torch.arange(len(names), device=close.device) != i
            score = close[:, others].topk(min(neighbours, len(names) - 1), dim=1).values.mean(dim=1)
            chosen[names[i]] = found[int((score - prior * torch.arange(len(found), device=close.device)).argmax())]
    return [chosen[match.name] for match in matches]


def _closeness(senses: dict[str, list[Sense]], encode: Encode) -> Iterator[tuple[int, torch.Tensor]]:
    """For each name with several senses its index, and how close each of its senses is to each class, [senses, names].

    Made in pieces of 64 MiB: all at once they would be 29 GiB for the 60,000 senses of ImageNet-21k.
    """
    counts = torch.tensor([len(found) for found in senses.values()])
    vectors = embed(encode, [*senses, *(describe(sense) for found in senses.values() for sense in found)])
    names, definitions = vectors[: len(counts)], vectors[len(counts) :]
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts).to(vectors.device)
    rows = torch.arange(len(definitions)).split(counts.tolist())
    asked = [i for i, count in enumerate(counts.tolist()) if count > 1]
    for part in _pieces(asked, counts.tolist(), _PIECE_BYTES // (4 * len(definitions))):
        chosen = definitions[torch.cat([rows[i] for i in part])]
        to_names = chosen @ names.T
        to_definitions = torch.full_like(to_names, -2.0)  # below every cosine
        to_definitions.scatter_reduce_(1, owner.expand(len(chosen), -1), chosen @ definitions.T, "amax")
        close = (to_names + torch.where(to_definitions < -1.5, to_names, to_definitions)) / 2
        yield from zip(part, close.split([int(counts[i]) for i in part]), strict=True)


def _pieces(asked: list[int], counts: list[int], rows: int) -> Iterator[list[int]]:
    """The names, in their order, in pieces of so many senses, or of one name."""
    piece: list[int] = []
    size = 0
    for i in asked:
        if piece and size + counts[i] > rows:
            yield piece
            piece, size = [], 0
        piece.append(i)
        size += counts[i]
    if piece:
        yield piece


def describe(sense: Sense) -> str:
    """A sense in one line for an encoder: what it is a kind of, and its definition.

    Without its name, which would draw all senses of a word to what the word alone suggests.
    """
    return ": ".join(filter(None, (", ".join(sense.hypernyms[:_HYPERNYMS]), sense.definition)))


def _candidates(match: Match) -> list[Sense]:
    """The senses that compete."""
    return [sense for sense in match.senses if sense.pos == match.senses[0].pos]
