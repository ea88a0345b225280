"""Text prompts of classes: templates, with and without definitions, within the tokens a text encoder takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.errors import InputError
from ..data.lines import read_lines
from .sense import Sense
from .shortening import chunk, close, shorten

TEMPLATES = ("a photo of a {}.",)
FITTINGS = ("auto", "shorten", "chunk")
_LEAST_WORDS = 4  # of a shortened definition: "person" alone says too little about who is quiet or timid


class TokenBudget:
    """How many tokens a text may have. count: text -> its tokens, special ones included."""

    def __init__(self, count: Callable[[str], int], max_tokens: int) -> None:
        if max_tokens < 1:
            raise InputError(f"max_tokens: {max_tokens} is no number of tokens; pass at least 1")
        self.count, self.max_tokens = count, max_tokens

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, max_tokens: int | None = None) -> TokenBudget:
        """The budget of a transformers tokenizer. max_tokens: None takes its model_max_length."""

        def count(text: str) -> int:
            return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

        return cls(count, tokenizer.model_max_length if max_tokens is None else max_tokens)

    def fits(self, text: str) -> bool:
        """Whether a text stays within the budget."""
        return self.count(text) <= self.max_tokens


@dataclass(frozen=True)
class ClassPrompts:
    """The texts of one class.

    names: a text for each template. knowledge: for each template the texts that carry the definition, whose embeddings
    are averaged: one, or several where the definition was dealt out; without a sense the template's own text.
    sense: what the definition is of, None where the class has none. fitted: "none" (no definition), "whole",
    "shortened" or "chunks".
    """

    name: str
    names: tuple[str, ...]
    knowledge: tuple[tuple[str, ...], ...]
    sense: Sense | None = None
    fitted: str = field(default="none")


def make_prompts(
    names: Sequence[str],
    senses: Sequence[Sense | None],
    budget: TokenBudget,
    templates: Sequence[str] = TEMPLATES,
    fitting: str = "auto",
) -> list[ClassPrompts]:
    """Prompts of classes and their senses: "a photo of a crane. ; crane , large long-necked wading bird", as K-LITE's.

    A definition that does not fit is cut at the end of a clause or, where not even the first fits, of a word
    ("shorten"), or dealt out over texts of their own, "crane , large long-necked", whose embeddings are averaged
    ("chunk"). "auto" cuts where clauses of four words and more fit behind every template, else deals out, as encoders
    of 16 tokens need. No text exceeds the budget, and no word is cut.
    senses: one for each name, None where there is no knowledge.
    Raises InputError for a template without one {}, an unknown fitting, and a class whose name alone does not fit.
    """
    if len(names) != len(senses):
        raise InputError(f"senses: there are {len(senses)} for {len(names)} names; pass one for each, None for none")
    if fitting not in FITTINGS:
        raise InputError(f"fitting: {fitting!r} is not available; allowed: {', '.join(map(repr, FITTINGS))}")
    check_templates(templates)
    return [_of_class(name, sense, budget, templates, fitting) for name, sense in zip(names, senses, strict=True)]


def check_templates(templates: Sequence[str]) -> None:
    """InputError where there are no templates, or one has not exactly one {}."""
    if not templates:
        raise InputError(f"templates: there are none; pass at least one, such as {TEMPLATES[0]!r}")
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise InputError(f"template {template!r}: needs {{}} once, where the class name goes; no other braces")


def read_templates(path: str | Path) -> list[str]:
    """Templates from a file, one a line; blank lines are passed over. InputError as `check_templates`."""
    templates = [line.strip() for line in read_lines(Path(path), "a template a line") if line.strip()]
    check_templates(templates)
    return templates


def _of_class(
    name: str, sense: Sense | None, budget: TokenBudget, templates: Sequence[str], fitting: str
) -> ClassPrompts:
    plain = tuple(template.replace("{}", name) for template in templates)
    for text in plain:
        if not budget.fits(text):
            raise InputError(
                f"class {name!r}: {text!r} has {budget.count(text)} tokens, and the encoder takes "
                f"{budget.max_tokens}; shorten the name or the template"
            )
    if sense is None:
        return ClassPrompts(name, plain, tuple((text,) for text in plain))
    made = None if fitting == "chunk" else _shortened(name, plain, sense, budget, by_words=fitting == "shorten")
    return made or _dealt_out(name, plain, sense, budget)


def _shortened(
    name: str, plain: tuple[str, ...], sense: Sense, budget: TokenBudget, by_words: bool
) -> ClassPrompts | None:
    """Each template with as many clauses as fit; where these say too little, None, or with as many words."""
    texts: list[tuple[str]] = []
    whole = True
    for text in plain:
        fits = _fits_behind(f"{text} ; {name} , ", budget)
        said = shorten(sense.definition, fits)
        if said is None or (said != sense.definition and len(said.split()) < _LEAST_WORDS):
            if not by_words:
                return None
            said = close(next(iter(chunk(sense.definition, fits) or ()), ""))
        whole = whole and said == sense.definition
        texts.append((f"{text} ; {name} , {said}" if said else text,))
    said_any = any(text != bare for (text,), bare in zip(texts, plain, strict=True))
    return ClassPrompts(name, plain, tuple(texts), sense, "whole" if whole else "shortened" if said_any else "none")


def _dealt_out(name: str, plain: tuple[str, ...], sense: Sense, budget: TokenBudget) -> ClassPrompts:
    """Each template's own text, and the pieces of the definition behind the name."""
    pieces = chunk(sense.definition, _fits_behind(f"{name} , ", budget))
    if pieces is None:
        raise InputError(
            f"class {name!r}: beside the name there is no room for the words of its definition in "
            f'{budget.max_tokens} tokens; leave its sense out (None) or take fitting="shorten"'
        )
    carried = tuple(f"{name} , {piece}" for piece in pieces)
    return ClassPrompts(name, plain, tuple((text, *carried) for text in plain), sense, "chunks")


def _fits_behind(beginning: str, budget: TokenBudget) -> Callable[[str], bool]:
    return lambda text: budget.fits(beginning + text)
