"""Captions of many classes at once, as Grounding DINO reads them, and each class's score among a caption's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.errors import InputError
from .prompts import TokenBudget
from .sense import Sense
from .shortening import shorten

_ENDS = re.compile(r"[.?]")  # what ends a class, and so cannot be in one
_BETWEEN = " . "


@dataclass(frozen=True)
class ClassCaption:
    """ "crane , large wading bird . mouse , small rodent ." spans: where each name stands in the text, (start, end)."""

    text: str
    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    def scores(self, logits: torch.Tensor, offsets: torch.Tensor | Sequence[tuple[int, int]]) -> torch.Tensor:
        """Each class's score for each box: the greatest among the tokens of its name, which have read its definition.

        logits: (..., T) of boxes and tokens, before the sigmoid. offsets: (L, 2), L <= T, the characters of each token,
        as a fast tokenizer gives with return_offsets_mapping. Returns (..., C) in [0, 1].
        Raises ValueError for shapes that do not fit and a name without a token, as of a caption that was cut.
        """
        places = torch.as_tensor(offsets)
        if places.ndim != 2 or places.shape[1] != 2 or len(places) > logits.shape[-1]:
            raise ValueError(
                f"offsets: {tuple(places.shape)}; must be (L, 2), L at most the {logits.shape[-1]} tokens of logits"
            )
        found = []
        for name, (start, end) in zip(self.names, self.spans, strict=True):
            own = (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
            if not own.any():
                raise ValueError(
                    f"offsets: no token is of {name!r}; pass those of the whole caption, which was not cut"
                )
            found.append(logits[..., : len(places)][..., own.to(logits.device)].amax(dim=-1))
        return torch.stack(found, dim=-1).sigmoid()


def make_class_captions(
    names: Sequence[str], senses: Sequence[Sense | None], budget: TokenBudget
) -> list[ClassCaption]:
    """All classes in one caption where their names fit in the budget together, else in as few as hold them in order.

    Definitions share what the names leave: all are shortened, at the end of a clause, to the same number of tokens, the
    greatest that fits; one whose first clause is longer is left out. Full stops and question marks, which separate
    classes, are taken out of names and definitions.
    senses: one for each name, None where there is no knowledge. Raises InputError for a name that does not fit alone.
    """
    if len(names) != len(senses):
        raise InputError(f"senses: there are {len(senses)} for {len(names)} names; pass one for each, None for none")
    groups: list[list[tuple[str, Sense | None]]] = []
    for name, sense in zip(names, senses, strict=True):
        bare = " ".join(_ENDS.sub(" ", name).split())
        if not bare or not budget.fits(_join([bare])):
            raise InputError(
                f"class {name!r}: {'is empty' if not bare else 'does not fit'} in a caption of {budget.max_tokens} "
                "tokens; shorten the name"
            )
        if groups and budget.fits(_join([*(held for held, _ in groups[-1]), bare])):
            groups[-1].append((bare, sense))
        else:
            groups.append([(bare, sense)])
    return [_caption(group, budget) for group in groups]


def _caption(group: Sequence[tuple[str, Sense | None]], budget: TokenBudget) -> ClassCaption:
    """With the longest definitions that fit, by bisection over the tokens of a class."""
    fits, too_many = 0, budget.max_tokens + 1
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        fits, too_many = (tried, too_many) if budget.fits(_join(_phrases(group, tried, budget))) else (fits, tried)
    phrases = _phrases(group, fits, budget)
    starts = [len(_BETWEEN.join(phrases[:i])) + (len(_BETWEEN) if i else 0) for i in range(len(phrases))]
    spans = tuple((start, start + len(name)) for start, (name, _) in zip(starts, group, strict=True))
    return ClassCaption(_join(phrases), tuple(name for name, _ in group), spans)


def _phrases(group: Sequence[tuple[str, Sense | None]], tokens: int, budget: TokenBudget) -> list[str]:
    """Each name with as many clauses as make at most so many tokens with it."""
    return [_phrase(name, sense, tokens, budget) for name, sense in group]


def _phrase(name: str, sense: Sense | None, tokens: int, budget: TokenBudget) -> str:
    definition = " ".join(_ENDS.sub(" ", sense.definition).split()) if sense else ""
    said = shorten(definition, lambda text: budget.count(f"{name} , {text}") <= tokens)
    return f"{name} , {said}" if said else name


def _join(phrases: Sequence[str]) -> str:
    return _BETWEEN.join(phrases) + _BETWEEN.rstrip()
