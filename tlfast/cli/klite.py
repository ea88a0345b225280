"""tlfast klite: what dictionaries say about class names, and text prompts with it; the other commands beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError, check_suffix, format_rows
from .backbone import LoadedBackbone, load_backbone
from .dictionaries import (
    ClassFile,
    GlossaryFile,
    NameColumn,
    NoBackOff,
    WiktionaryDump,
    WordNetFolder,
    open_dictionary,
    read_classes,
)
from .klite_eval import evaluate
from .klite_train import train
from .klite_zeroshot import zeroshot
from .output import emit, quiet_libraries

if TYPE_CHECKING:
    from ..knowledge import ClassPrompts, Match, Sense, TokenBudget

app = typer.Typer(
    help="Class names with knowledge from dictionaries, and image-text models that read them (K-LITE).",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
RowsFile = Annotated[Path | None, typer.Option("--out", help="A .tsv, .csv or .jsonl file to write as well.")]

_SHOWN = 20  # rows of a table on the terminal
_EXAMPLES = 3  # of class names


@app.command()
def lookup(
    words: Annotated[list[str], typer.Argument(help="Class names (in quotes where they have blanks) or wnids.")],
    wordnet: WordNetFolder = None,
    wiktionary: WiktionaryDump = None,
    glossary: GlossaryFile = None,
    no_back_off: NoBackOff = False,
    senses: Annotated[int, typer.Option(min=1, help="Senses of a word to show; --json has all.")] = 5,
    as_json: Json = False,
) -> None:
    """Look words up: how each was found, and its senses, the best first."""
    dictionary = open_dictionary(wordnet, wiktionary, glossary, as_json)
    matches = [dictionary.find(word, not no_back_off) for word in words]
    if as_json:
        emit({"dictionary": dictionary.name, "words": [_match_object(match) for match in matches]}, [], as_json)
        return
    rows = []
    for match in matches:
        found = match.kind if match.form.casefold() == match.name.casefold() else f"{match.kind}: {match.form}"
        rows += [
            (match.name if not i else "", found if not i else "", sense.wnid or sense.pos, _said(sense))
            for i, sense in enumerate(match.senses[:senses])
        ] or [(match.name, "none", "", "")]
        if len(match.senses) > senses:
            rows.append(("", "", "", f"and {len(match.senses) - senses} more; --senses shows them"))
    _print_table(dictionary.name, ("word", "found", "sense", "definition"), rows)


@app.command()
def coverage(
    classes: ClassFile,
    column: NameColumn = "name",
    wordnet: WordNetFolder = None,
    wiktionary: WiktionaryDump = None,
    glossary: GlossaryFile = None,
    no_back_off: NoBackOff = False,
    out: RowsFile = None,
    as_json: Json = False,
) -> None:
    """Count how many class names a dictionary knows, and how each was found."""
    from ..knowledge import cover

    if out is not None:
        check_suffix(out)
    names = read_classes(classes, column)
    dictionary = open_dictionary(wordnet, wiktionary, glossary, as_json)
    found = cover(dictionary, names, not no_back_off)
    if out is not None:
        _write_rows(out, [_coverage_row(match) for match in found.matches])
    result = {
        "dictionary": dictionary.name,
        "classes": len(names),
        "covered": found.covered,
        "ambiguous": found.ambiguous,
        "counts": found.counts,
        "missing": found.missing,
        "head_nouns": {match.name: match.form for match in found.matches if match.kind == "head noun"},
    }
    if as_json:
        emit(result, [], as_json)
        return
    examples = {kind: [match.name for match in found.matches if match.kind == kind] for kind in found.counts}
    rows = [
        (kind, f"{count:,}", f"{100 * count / len(names):.1f} %", ", ".join(examples[kind][:_EXAMPLES]))
        for kind, count in found.counts.items()
    ]
    _print_table(f"{len(names):,} classes in {dictionary.name}", ("found", "classes", "share", "such as"), rows)
    lines = [f"{found.covered:,} of {len(names):,} covered, {found.ambiguous:,} of them with several senses"]
    emit(result, [*lines, *([f"rows are in {out}"] if out else [])], as_json)


@app.command()
def prompts(
    classes: ClassFile,
    backbone: Annotated[str, typer.Option(help='Folder or Hugging Face name of the text encoder, or "minilm".')],
    column: NameColumn = "name",
    wordnet: WordNetFolder = None,
    wiktionary: WiktionaryDump = None,
    glossary: GlossaryFile = None,
    no_back_off: NoBackOff = False,
    choice: Annotated[
        str,
        typer.Option(
            help='Which sense a class has: "first", or "nearest", whose definition lies closest to the other class '
            "names under --backbone."
        ),
    ] = "first",
    templates: Annotated[
        Path | None, typer.Option(help='A file with a template a line, {} for the name; default: "a photo of a {}."')
    ] = None,
    fitting: Annotated[
        str,
        typer.Option(
            help='What becomes of definitions that do not fit: "shorten" them at clauses, deal them out over texts '
            'that are averaged ("chunk"), or "auto": the first where enough of them fits.'
        ),
    ] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a text may have; default: the most the model takes.")
    ] = None,
    out: RowsFile = None,
    as_json: Json = False,
) -> None:
    """Make text prompts of class names, alone and with their definitions, that a text encoder takes whole."""
    quiet_libraries()
    from .. import knowledge

    if choice not in knowledge.CHOICES:
        raise InputError(f"--choice {choice!r}: is not available; choose one of {', '.join(knowledge.CHOICES)}")
    if out is not None:
        check_suffix(out)
    names = read_classes(classes, column)
    chosen = knowledge.TEMPLATES if templates is None else knowledge.read_templates(templates)
    dictionary = open_dictionary(wordnet, wiktionary, glossary, as_json)
    matches = [dictionary.find(name, not no_back_off) for name in names]
    loaded = load_backbone(backbone)
    budget = knowledge.TokenBudget.of_tokenizer(loaded.tokenizer, _tokens(max_tokens, loaded))
    made = knowledge.make_prompts(names, _choose(choice, matches, loaded), budget, chosen, fitting)
    rows = [row for prompt in made for row in _prompt_rows(prompt, budget)]
    if out is not None:
        _write_rows(out, rows)
    result = _prompt_result(made, rows, budget) | {"dictionary": dictionary.name, "backbone": loaded.name}
    if as_json:
        emit(result | {"prompts": rows}, [], as_json)
        return
    shown = [(prompt.name, prompt.fitted, " | ".join(prompt.knowledge[0])) for prompt in made[:_SHOWN]]
    _print_table(
        f"Prompts for {loaded.name}, at most {budget.max_tokens:,} tokens",
        ("class", "definition", "texts with knowledge" if len(chosen) == 1 else "texts of the first template"),
        shown,
    )
    emit(result, _prompt_lines(result, len(made), out), as_json)


def _tokens(asked: int | None, loaded: LoadedBackbone) -> int:
    if asked is not None and asked > loaded.max_length:
        raise InputError(f"--max-tokens {asked}: {loaded.name} takes {loaded.max_length} at most")
    return asked or loaded.max_length


def _choose(choice: str, matches: list[Match], loaded: LoadedBackbone) -> list[Sense | None]:
    from ..knowledge import choose_first, choose_nearest

    if choice == "first":
        return choose_first(matches)
    from .text_encoder import text_encoder

    return choose_nearest(matches, text_encoder(loaded))


def _match_object(match: Match) -> dict[str, Any]:
    senses = [asdict(sense) | {"wnid": sense.wnid} for sense in match.senses]
    return {"name": match.name, "kind": match.kind, "form": match.form, "senses": senses}


def _coverage_row(match: Match) -> dict[str, Any]:
    first = match.senses[0] if match.senses else None
    return {
        "name": match.name,
        "kind": match.kind,
        "form": match.form,
        "senses": len(match.senses),
        "wnid": (first and first.wnid) or "",
        "definition": first.definition if first else "",
    }


def _prompt_rows(prompt: ClassPrompts, budget: TokenBudget) -> list[dict[str, Any]]:
    """A row for each text; those of one class, role and template are averaged first, then templates."""
    names = [("name", i, text) for i, text in enumerate(prompt.names)]
    knowledge = [("knowledge", i, text) for i, texts in enumerate(prompt.knowledge) for text in texts]
    return [
        {"class": prompt.name, "role": role, "template": i, "tokens": budget.count(text), "text": text}
        for role, i, text in (*names, *knowledge)
    ]


def _prompt_result(made: list[ClassPrompts], rows: list[dict[str, Any]], budget: TokenBudget) -> dict[str, Any]:
    tokens = [row["tokens"] for row in rows if row["role"] == "knowledge"]
    fitted = [prompt.fitted for prompt in made]
    return {
        "classes": len(made),
        "with_knowledge": sum(prompt.sense is not None for prompt in made),
        "definitions": {how: fitted.count(how) for how in ("whole", "shortened", "chunks", "none")},
        "texts": len(rows),
        "tokens": {"median": statistics.median(tokens), "most": max(tokens), "allowed": budget.max_tokens},
    }


def _prompt_lines(result: dict[str, Any], count: int, out: Path | None) -> list[str]:
    definitions, tokens = result["definitions"], result["tokens"]
    lines = [
        f"{result['with_knowledge']:,} of {count:,} classes have a definition: {definitions['whole']:,} whole, "
        f"{definitions['shortened']:,} shortened, {definitions['chunks']:,} in chunks",
        f"tokens of a text with knowledge: median {tokens['median']:g}, most {tokens['most']}",
    ]
    if out:
        return [*lines, f"{result['texts']:,} texts are in {out}"]
    return lines if count <= _SHOWN else [*lines, f"the first {_SHOWN} classes are shown; --out writes all"]


def _said(sense: Sense) -> str:
    kind = f" ({sense.hypernyms[0]})" if sense.hypernyms else ""
    return f"{sense.lemma}{kind}: {sense.definition}"


def _write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    from ..training import write_whole

    write_whole(out, format_rows(rows, out.suffix.lower()))


def _print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # what looks like markup is text
    Console(highlight=False).print(table)


for _name, _command in (("zeroshot", zeroshot), ("train", train), ("eval", evaluate)):
    app.command(_name)(_command)
