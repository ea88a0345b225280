"""tlfast demo klite: which package does a docstring document, asked without training, with and without knowledge."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import format_rows
from .backbone import MINILM, load_backbone
from .output import note
from .text_encoder import text_encoder

if TYPE_CHECKING:
    import torch

    from ..data.docstrings import Passage
    from ..data.packages import Family
    from ..knowledge import ClassEmbeddings, Coverage

DATA, GLOSSARY, REPORT, PICTURE, METRICS = "data", "glossary.tsv", "report.md", "blend.png", "metrics.json"
WRITTEN = (DATA, GLOSSARY, REPORT, PICTURE, METRICS)
TITLE = "Which package does a docstring document? Zero-shot with and without knowledge, MiniLM-L6"

DEV, TEST, FILES, SEED = 40, 80, 150, 0  # texts of a package; files of it that are read
TEMPLATES = ("the documentation of {}.",)
MAX_TOKENS = 128  # the texts have 90 words at most
ALONE, KNOWLEDGE, BLEND = "class names alone", "with the package's summary", "blend"


def run(staging: Path, out: Path, quiet: bool) -> dict[str, Any]:
    """Write everything into `staging`, which becomes `out`; returns the metrics."""
    from .. import knowledge
    from ..data.docstrings import load_corpus
    from ..data.packages import MASKED, installed_families

    start = time.perf_counter()
    say = (lambda line: None) if quiet else note
    say("reading docstrings")
    families = installed_families()
    roots = {family.name: family.root for family in families}
    corpus = load_corpus(train=DEV, dev=0, test=TEST, seed=SEED, roots=roots, masked=MASKED, files=FILES)
    files = _write(staging, corpus.train, corpus.test, families)

    names = list(roots)
    found = knowledge.cover(knowledge.Glossary(files["glossary"]), names, back_off=False)
    loaded = load_backbone(MINILM)
    budget = knowledge.TokenBudget.of_tokenizer(loaded.tokenizer, min(MAX_TOKENS, loaded.max_length))
    prompts = knowledge.make_prompts(names, knowledge.choose_first(found.matches), budget, TEMPLATES)
    encode = text_encoder(loaded)
    say(f"embedding {len(corpus.train) + len(corpus.test):,} texts and {len(names)} classes")
    classes = knowledge.embed_classes(prompts, encode)
    dev, test = (_embed(encode, passages, names) for passages in (corpus.train, corpus.test))
    weight, accuracies = classes.choose_weight(*dev)
    metrics = _metrics(classes, found, test, weight, accuracies, len(dev[1]))
    metrics["seconds"] = time.perf_counter() - start
    _write_results(staging, out, metrics, families, classes, test)
    return metrics


def show(metrics: dict[str, Any], out: Path) -> None:
    """Print what came out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=TITLE, title_justify="left", title_style="")
    for column, justify in (("class embeddings", "left"), ("weight of knowledge", "right"), ("test accuracy", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in metrics["methods"]:
        table.add_row(*_cells(row))
    console = Console(highlight=False)
    console.print(table)
    for line in _lines(metrics):
        console.print(line)
    console.print(f"{REPORT}, {METRICS}, {PICTURE}, {GLOSSARY} and the data are in {out}")


def _write(staging: Path, dev: list[Passage], test: list[Passage], families: list[Family]) -> dict[str, Path]:
    """dev.tsv, test.tsv and glossary.tsv, as `tlfast klite` reads them."""
    (staging / DATA).mkdir()
    said = [{"name": family.name, "definition": family.summary} for family in families if family.summary]
    tables = {
        "dev": (staging / DATA / "dev.tsv", [passage._asdict() for passage in dev]),
        "test": (staging / DATA / "test.tsv", [passage._asdict() for passage in test]),
        "glossary": (staging / GLOSSARY, said),
    }
    for path, rows in tables.values():
        path.write_text(format_rows(rows, ".tsv"), encoding="utf-8")
    return {name: path for name, (path, _) in tables.items()}


def _embed(encode: Any, passages: list[Passage], names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) and the classes' rows, (N,)."""
    import torch

    vectors = encode([passage.text for passage in passages])
    return torch.as_tensor(vectors), torch.tensor([names.index(passage.label) for passage in passages])


def _metrics(
    classes: ClassEmbeddings,
    found: Coverage,
    test: tuple[torch.Tensor, torch.Tensor],
    weight: float,
    accuracies: dict[float, float],
    dev_examples: int,
) -> dict[str, Any]:
    from ..bench import measure
    from ..bench.comparison import Method, gain

    methods = []
    for name, w in ((ALONE, 0.0), (KNOWLEDGE, 1.0), (BLEND, weight)):
        correct = _correct(classes, test, w)
        row = {"name": name, "weight": w, "accuracy": float(correct.mean()), "examples": len(correct)}
        methods.append(Method(row, correct))
    alone, *others = methods
    return {
        "title": TITLE,
        "accuracy": methods[-1].row["accuracy"],
        "coverage": {"classes": len(found.matches), "covered": found.covered, "missing": found.missing},
        "methods": [method.row for method in methods],
        "gains": [gain(method, alone) for method in others],
        "dev_accuracies": {str(w): accuracy for w, accuracy in accuracies.items()},
        "examples": {"dev": dev_examples, "test": len(test[1])},
        **measure.environment(),
    }


def _correct(classes: ClassEmbeddings, test: tuple[torch.Tensor, torch.Tensor], weight: float) -> Any:
    """(N,) bool: which of the texts have their own class nearest."""
    images, labels = test
    return ((images @ classes.blend(weight).T).argmax(dim=1) == labels).numpy()


def _lines(metrics: dict[str, Any]) -> list[str]:
    from ..bench.comparison import verdict

    coverage = metrics["coverage"]
    missing = f"; without one: {', '.join(coverage['missing'])}" if coverage["missing"] else ""
    found = f"{coverage['covered']} of {coverage['classes']} packages have a summary{missing}"
    return [found, *map(verdict, metrics["gains"])]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return row["name"], f"{row['weight']:.1f}", f"{100 * row['accuracy']:.1f} %"


def _write_results(
    staging: Path,
    out: Path,
    metrics: dict[str, Any],
    families: list[Family],
    classes: ClassEmbeddings,
    test: tuple[torch.Tensor, torch.Tensor],
) -> None:
    from .. import training

    rows = [(family, _of_family(classes, test, number, metrics)) for number, family in enumerate(families)]
    _draw(staging / PICTURE, metrics, classes, test)
    (staging / REPORT).write_text(_report(metrics, rows, out), encoding="utf-8")
    training.RunFolder(out).write_metrics(staging, metrics)


def _of_family(
    classes: ClassEmbeddings, test: tuple[torch.Tensor, torch.Tensor], number: int, metrics: dict[str, Any]
) -> list[float]:
    """The accuracy of each method on the texts of one package."""
    own = (test[1] == number).numpy()
    return [float(_correct(classes, test, row["weight"])[own].mean()) for row in metrics["methods"]]


def _draw(
    path: Path, metrics: dict[str, Any], classes: ClassEmbeddings, test: tuple[torch.Tensor, torch.Tensor]
) -> None:
    from ..bench.blend_curve import draw_blend

    dev = {float(weight): accuracy for weight, accuracy in metrics["dev_accuracies"].items()}
    of_test = {weight: float(_correct(classes, test, weight).mean()) for weight in dev}
    draw_blend(path, dev, of_test, metrics["methods"][-1]["weight"], len(test[1]), TITLE)


def _report(metrics: dict[str, Any], rows: list[tuple[Family, list[float]]], out: Path) -> str:
    machine, versions, examples = metrics["machine"], metrics["versions"], metrics["examples"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    table = "\n".join(f"| {' | '.join(_cells(row))} |" for row in metrics["methods"])
    per_family = "\n".join(
        f"| {family.name} | {(family.summary or '-').replace('|', chr(92) + '|')} | "
        f"{' | '.join(f'{100 * accuracy:.0f} %' for accuracy in accuracies)} |"
        for family, accuracies in rows
    )
    lines = "\n".join(f"- {line}" for line in _lines(metrics))
    return f"""# {TITLE}

| class embeddings | weight of knowledge | test accuracy |
| --- | ---: | ---: |
{table}

{lines}

![accuracy by weight]({PICTURE})

| package | its summary, the knowledge | {ALONE} | {KNOWLEDGE} | {BLEND} |
| --- | --- | ---: | ---: | ---: |
{per_family}

- Task: tell from the prose of a docstring, with package names masked, which of {metrics["coverage"]["classes"]}
  packages it documents; chance is {100 / metrics["coverage"]["classes"]:.1f} %. {examples["test"]:,} texts to test on,
  as many of each package, and {examples["dev"]:,} that choose the blend's weight; no file and no text is in both.
- Nothing is trained. A text takes the nearest class; a class is the embedding of "{TEMPLATES[0].format("NumPy")}", and
  with knowledge of the same with the summary behind it, which `{GLOSSARY}` has as the package's metadata say it.
- Measured on {machine["cpu"]}, {machine["cores"]} cores, in {metrics["seconds"]:.0f} s; {packages}.

Look up what is known of a package: `tlfast klite lookup NumPy --glossary {out / GLOSSARY}`
"""
