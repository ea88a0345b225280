"""Which of a name's senses a class has: the first, or the nearest to the other classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .encoding import Encode, embed
from .sense import Match, Sense

CHOICES = ("first", "nearest")

# Chosen on the 1,000 ImageNet names, whose first 398 must be animals and next 502 artifacts, with MiniLM-L6: right for
# 206 of 236 ambiguous names, against 167 by the first sense.
NEIGHBOURS = 10
PRIOR = 0.01
_HYPERNYMS = 5


def choose_first(matches: Sequence[Match]) -> list[Sense | None]:
    """Each name's first sense, the one its dictionary ranks highest; None for a name without."""
    return [match.senses[0] if match.senses else None for match in matches]


def choose_nearest(
    matches: Sequence[Match], encode: Encode, neighbours: int = NEIGHBOURS, prior: float = PRIOR
) -> list[Sense | None]:
    """Each name's sense whose definition lies closest to the other class names; None for a name without.

    Closeness is the mean cosine of `describe(sense)` with the `neighbours` closest other names: among herons a "crane"
    is a bird, among excavators a machine, in a set that has both whatever is closest to its own like. The dictionary's
    order counts `prior` (a cosine) for each rank. Only senses with the first one's part of speech compete, so that an
    "orange" that was found as a noun is no adjective. A set of a single name takes its first sense.
    encode: list[str] -> (N, D), array or tensor. Raises ValueError where it returns something else.
    """
    chosen = dict(zip((match.name for match in matches), choose_first(matches), strict=True))
    names = list(chosen)
    open_matches = {match.name: _candidates(match) for match in matches if len(_candidates(match)) > 1}
    if not open_matches or len(names) < 2:
        return [chosen[match.name] for match in matches]
    described = [describe(sense) for senses in open_matches.values() for sense in senses]
    vectors = embed(encode, [*names, *described])
    similar = vectors[len(names) :] @ vectors[: len(names)].T  # [senses, names]
    blocks = similar.split([len(senses) for senses in open_matches.values()])
    for (name, senses), block in zip(open_matches.items(), blocks, strict=True):
        others = torch.arange(len(names), device=block.device) != names.index(name)
        closest = block[:, others].topk(min(neighbours, len(names) - 1), dim=1).values.mean(dim=1)
        rank = torch.arange(len(senses), device=block.device)
        chosen[name] = senses[int((closest - prior * rank).argmax())]
    return [chosen[match.name] for match in matches]


def describe(sense: Sense) -> str:
    """A sense in one line for an encoder: what it is a kind of, and its definition.

    Without its name, which would draw all senses of a word to what the word alone suggests.
    """
    return ": ".join(filter(None, (", ".join(sense.hypernyms[:_HYPERNYMS]), sense.definition)))


def _candidates(match: Match) -> list[Sense]:
    return [sense for sense in match.senses if sense.pos == match.senses[0].pos]
