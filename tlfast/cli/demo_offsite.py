"""tlfast demo offsite: two folders, two processes, and only what offsite-tuning sends between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import InputError, format_rows
from .backbone import MINILM
from .output import emit, note

SEED, ADAPTER, EMULATOR, STEPS, EPOCHS, LEARNING_RATE = 0, "1,1", "keep:2", 100, 3, "3e-4"
OWNER, OTHER, REPORT, METRICS = "model-owner", "data-owner", "report.md", "metrics.json"
TITLE = "Which package does a docstring document? MiniLM-L6 tuned by somebody who does not have it"
_COMMAND = "from tlfast.cli import main; main()"


def demo_offsite(out: Path, as_json: bool) -> None:
    """Let the owner of MiniLM and an owner of labelled docstrings tune it together, each in processes of their own.

    Raises InputError where `out` exists, a package is missing or a step fails.
    """
    from ..offsite.folder import new_folder

    say = (lambda line: None) if as_json else note
    with new_folder(out) as folder:
        metrics = _run(folder, say)
        (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        report = _report(metrics)
        (folder / REPORT).write_text(report, encoding="utf-8")
    emit(metrics, [report, f"{REPORT}, {METRICS} and the folders of both are in {out}"], as_json)


def _run(folder: Path, say: Any) -> dict[str, Any]:
    owner, other = folder / OWNER, folder / OTHER
    say("reading docstrings: half of the training texts, without labels, are the model owner's")
    _write_data(owner, other)
    say(f"model owner: makes a bundle, distilled in {STEPS} steps")
    distil = ("--distill", "texts.tsv", "--steps", STEPS)
    made = _tlfast(
        owner, "make", "--model", MINILM, "--adapter", ADAPTER, "--emulator", EMULATOR, "--out", "bundle", *distil
    )
    audit = _tlfast(owner, "audit", "bundle", "--model", MINILM, "--out", "audit")
    shutil.copytree(owner / "bundle", other / "bundle")
    say(f"data owner: tunes on the bundle, {EPOCHS} epochs")
    files = ("--train", "train.tsv", "--dev", "dev.tsv", "--test", "test.tsv")
    settings = ("--epochs", EPOCHS, "--lr", LEARNING_RATE)
    trained = _tlfast(other, "train", "bundle", *files, *settings, "--out", "run")
    shutil.copytree(other / "run" / "adapter", owner / "adapter")
    say("model owner: checks the adapter and plugs it in")
    _tlfast(owner, "plug", "--model", MINILM, "--bundle", "bundle", "--adapter", "adapter", "--out", "plugged")
    say("both models on the test texts")
    test = Path("..") / OTHER / "test.tsv"
    stages = _tlfast(owner, "eval", "--model", MINILM, "--bundle", "bundle", "--adapter", "adapter", "--test", test)
    return {
        "title": TITLE,
        "accuracy": stages["scores"]["plug-in"],
        "stages": stages,
        "bundle": {name: made[name] for name in ("sha256", "bytes", "adapter", "middle", "total")},
        "audit": {name: audit[name] for name in ("verbatim_matrices", "revealed_matrices")},
        "sent_back_bytes": sum(path.stat().st_size for path in (owner / "adapter").iterdir()),
        "seconds_per_epoch": trained["seconds_per_epoch"],
        "saved_bytes_per_sample": trained["saved_bytes_per_sample"],
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "versions": trained["versions"],
        "machine": trained["machine"],
    }


def _write_data(owner: Path, other: Path) -> None:
    """Texts without labels for the one, labelled ones for the other; no text is with both."""
    from ..data.docstrings import load_corpus

    corpus = load_corpus(seed=SEED)
    half = len(corpus.train) // 2
    owner.mkdir()
    other.mkdir()
    unlabelled = [{"text": passage.text} for passage in corpus.train[:half]]
    (owner / "texts.tsv").write_text(format_rows(unlabelled, ".tsv"), encoding="utf-8")
    for name, passages in (("train", corpus.train[half:]), ("dev", corpus.dev), ("test", corpus.test)):
        rows = [passage._asdict() for passage in passages]
        (other / f"{name}.tsv").write_text(format_rows(rows, ".tsv"), encoding="utf-8")


def _tlfast(folder: Path, *arguments: object) -> dict[str, Any]:
    """Run tlfast offsite in a process of its own, in a party's folder; the object it prints.

    Raises InputError with what it said where it fails.
    """
    command: Sequence[str] = [sys.executable, "-c", _COMMAND, "offsite", *map(str, arguments), "--json"]
    # the children find this tlfast, wherever it was imported from
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was ended"])[-1].removeprefix("error: ")
        raise InputError(f"demo: tlfast offsite {arguments[0]} failed: {reason}")
    return json.loads(done.stdout)


def _report(metrics: dict[str, Any]) -> str:
    stages, audit = metrics["stages"], metrics["audit"]
    says = {True: "holds", False: "does not hold", None: "is not seen (the interval contains 0)"}
    rows = "\n".join(
        f"| {name} | {100 * score:.1f} % | {100 * stages['intervals'][name][0]:.1f} to "
        f"{100 * stages['intervals'][name][1]:.1f} |"
        for name, score in stages["scores"].items()
    )
    promises = "; ".join(f"{promise} {says[held]}" for promise, held in stages["promises"].items())
    return f"""# {TITLE}

| model | accuracy on {stages["n"]:,} test texts | 95 % interval |
| --- | ---: | ---: |
{rows}

What offsite-tuning promises: {promises}.

- {OWNER}/ never had a labelled text; {OTHER}/ never had the model. Between them went bundle/
  ({metrics["bundle"]["bytes"]:,} bytes) and adapter/ ({metrics["sent_back_bytes"]:,} bytes).
- Adapter {ADAPTER}, emulator {EMULATOR}, distilled in {STEPS} steps on texts of the model's owner:
  {100 * audit["verbatim_matrices"]:.1f} % of the middle's matrices were sent to the bit,
  {100 * audit["revealed_matrices"]:.1f} % to the bit or with a cosine of at least 0.99 (audit/audit.png).
- For the table above the owner's process also read {OTHER}/test.tsv; without that comparison it would not.
- "zero-shot" is the full model with the returned head on blocks that nobody tuned.
"""
