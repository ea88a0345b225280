"""Which of a name's senses a class has: the first, or the nearest to the other classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .encoding import Encode, embed
from .sense import Match, Sense

CHOICES = ("first", "nearest")
NEIGHBOURS = 10


def choose_first(matches: Sequence[Match]) -> list[Sense | None]:
    """Each name's first sense, the one its dictionary ranks highest; None for a name without."""
    return [match.senses[0] if match.senses else None for match in matches]


def choose_nearest(matches: Sequence[Match], encode: Encode, neighbours: int = NEIGHBOURS) -> list[Sense | None]:
    """Each name's sense whose definition lies closest to the other class names; None for a name without.

    Closeness is the mean cosine of the definition (with the sense's name and hypernym before it) with the `neighbours`
    closest other names, so that a set of animals and tools pulls "crane" to one of its own kind. Ties, and a set of one
    class, go to the earlier sense. Only part-of-speech peers of the first sense compete: a class called "orange" that
    was found as a noun is no verb.
    encode: list[str] -> (N, D). Raises ValueError for what it must not return.
    """
    names = list(dict.fromkeys(match.name for match in matches))
    candidates = {match.name: _candidates(match) for match in matches}
    open_names = [name for name in names if len(candidates[name]) > 1]
    if not open_names or len(names) < 2:
        return choose_first(matches)
    vectors = embed(encode, names)
    texts = [describe(sense) for name in open_names for sense in candidates[name]]
    similar = embed(encode, texts) @ vectors.T  # [senses, names]
    chosen, start = {}, 0
    for name in open_names:
        block = similar[start : start + len(candidates[name])].clone()
        start += len(block)
        others = torch.cat([block[:, : names.index(name)], block[:, names.index(name) + 1 :]], dim=1)
        score = others.topk(min(neighbours, others.shape[1]), dim=1).values.mean(dim=1)
        chosen[name] = candidates[name][int(score.argmax())]
    return [chosen.get(match.name) or (match.senses[0] if match.senses else None) for match in matches]


def describe(sense: Sense) -> str:
    """A sense in one line for an encoder: its name, what it is a kind of, its definition."""
    kind = f" ({sense.hypernyms[0]})" if sense.hypernyms else ""
    return f"{sense.lemma}{kind}: {sense.definition}"


def _candidates(match: Match) -> list[Sense]:
    return [sense for sense in match.senses if sense.pos == match.senses[0].pos]
