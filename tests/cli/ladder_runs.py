"""A tiny backbone on disk, data files for it, and the ladder command called in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer
from typer.testing import CliRunner, Result

from tlfast.cli import app

GOOD = ["good", "fine", "great", "lovely"]
BAD = ["bad", "poor", "awful", "dull"]
NEUTRAL = ["the", "film", "a", "plot", "is", "was"]


def save_backbone(folder: Path, seed: int = 0, blocks: int = 2) -> Path:
    """A random BERT with so many blocks and a vocabulary of the words above."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def sentence(good: int, bad: int, draw: random.Random) -> str:
    """A sentence with so many good and bad words among neutral ones."""
    words = draw.choices(GOOD, k=good) + draw.choices(BAD, k=bad) + draw.choices(NEUTRAL, k=draw.randint(2, 8))
    draw.shuffle(words)
    return " ".join(words)


def write_sentences(path: Path, count: int, seed: int) -> Path:
    """A .tsv: is the sentence good (1) or bad (0)?"""
    draw = random.Random(seed)
    rows = [(sentence(label, 1 - label, draw), label) for label in (draw.randint(0, 1) for _ in range(count))]
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """A .csv of pairs: are both of one mind?"""
    draw = random.Random(seed)
    lines = ["text,text_pair,label"]
    for _ in range(count):
        a, b = draw.randint(0, 1), draw.randint(0, 1)
        label = "same" if a == b else "different"
        lines.append(f"{sentence(a, 1 - a, draw)},{sentence(b, 1 - b, draw)},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_ratings(path: Path, count: int, seed: int) -> Path:
    """A .jsonl: how good is the sentence, from -1.0 to 1.0?"""
    draw = random.Random(seed)
    rows = [(good, 2 - good) for good in (draw.randint(0, 2) for _ in range(count))]
    lines = [json.dumps({"text": sentence(good, bad, draw), "label": float(good - 1)}) for good, bad in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> Result:
    """`tlfast ladder ...`; exceptions that are not the user's fault come through."""
    return CliRunner().invoke(app, ["ladder", *map(str, arguments)], catch_exceptions=False)


def train(backbone: Path, train: Path, test: Path, out: Path, *more: object) -> Result:
    """`tlfast ladder train` with settings that suit the tiny backbone; later options win."""
    return run(
        "train", "--backbone", backbone, "--train", train, "--test", test, "--out", out,
        "--reduction", 2, "--epochs", 3, "--batch-size", 8, "--lr", "1e-2", *more,
    )  # fmt: skip


def metrics(out: Path) -> dict:
    """metrics.json of a run."""
    return json.loads((out / "metrics.json").read_text())


def write_moods(path: Path, count: int, seed: int) -> Path:
    """A .tsv with any of the labels good and bad, by the words that are there."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        good, bad = draw.randint(0, 1), draw.randint(0, 1)
        lines.append(f"{sentence(good, bad, draw)}\t{'|'.join(['bad'] * bad + ['good'] * good)}")
    path.write_text("text\tlabel\n" + "".join(f"{line}\n" for line in lines))
    return path


def refused(result, *texts):
    """One line on standard error with these texts, nothing on standard output, status 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for text in texts:
        assert text in result.stderr
