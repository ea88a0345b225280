"""Which of a name's senses a class has: the first, or the nearest to the other classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .encoding import Encode, embed
from .sense import Match, Sense

CHOICES = ("first", "nearest")

# Chosen with MiniLM-L6 on the 1,000 ImageNet names, whose first 398 must be animals and the next 502 artifacts, and
# on 30 small sets of classes: right for 220 of ImageNet's 236 ambiguous names, against 167 by the first sense.
NEIGHBOURS = 5
PRIOR = 0.02
_HYPERNYMS = 5


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
        close, ranks = _closeness(senses, encode)
        for i, (block, (name, found)) in enumerate(zip(close.split(list(ranks)), senses.items(), strict=True)):
            if len(found) > 1:
                others = torch.arange(len(names), device=block.device) != i
                score = block[:, others].topk(min(neighbours, len(names) - 1), dim=1).values.mean(dim=1)
                chosen[name] = found[int((score - prior * torch.arange(len(found), device=block.device)).argmax())]
    return [chosen[match.name] for match in matches]


def _closeness(senses: dict[str, list[Sense]], encode: Encode) -> tuple[torch.Tensor, list[int]]:
    """How close each sense, all names' behind each other, is to each class, [senses, names]; and senses a name."""
    counts = [len(found) for found in senses.values()]
    vectors = embed(encode, [*senses, *(describe(sense) for found in senses.values() for sense in found)])
    names, definitions = vectors[: len(counts)], vectors[len(counts) :]
    to_names = definitions @ names.T
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(vectors.device)
    to_definitions = torch.full_like(to_names, -2.0)  # below every cosine
    to_definitions.scatter_reduce_(1, owner.expand(len(owner), -1), definitions @ definitions.T, "amax")
    return (to_names + torch.where(to_definitions < -1.5, to_names, to_definitions)) / 2, counts


def describe(sense: Sense) -> str:
    """A sense in one line for an encoder: what it is a kind of, and its definition.

    Without its name, which would draw all senses of a word to what the word alone suggests.
    """
    return ": ".join(filter(None, (", ".join(sense.hypernyms[:_HYPERNYMS]), sense.definition)))


def _candidates(match: Match) -> list[Sense]:
    """The senses that compete."""
    return [sense for sense in match.senses if sense.pos == match.senses[0].pos]
