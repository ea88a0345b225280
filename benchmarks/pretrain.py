"""Small models made here, in minutes, where no hub can be asked: what the transfer benchmarks transfer from.

A byte-level GPT-2 reads the Python sources of the standard library and NumPy; a ViT reads printed letters, distorted.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from benchmarks import letters
from benchmarks.loop import Columns, shuffled_batches, train
from tlfast.data.docstrings import package_roots, read_passages

CONTEXT = 256
END = 256  # the token behind each document, after the 256 bytes
_GPT2_STEPS, _GPT2_BATCH, _GPT2_RATE = 800, 12, 2e-3
_VIT_STEPS, _VIT_BATCH, _VIT_RATE = 2000, 64, 1e-3
_NOT_SOURCES = {"site-packages", "test", "tests", "testing", "_vendor"}


def byte_gpt2(width: int = 256, layers: int = 6, heads: int = 4, steps: int = _GPT2_STEPS) -> GPT2LMHeadModel:
    """A GPT-2 over bytes, pre-trained on Python sources; no dropout: it reads nothing twice."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=END + 1,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=END,
        eos_token_id=END,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    data = blocks(python_sources(), steps * _GPT2_BATCH)
    train(model, shuffled_batches(data, _GPT2_BATCH, steps), steps, _GPT2_RATE, autocast=True)
    return model


def letter_vit() -> ViTForImageClassification:
    """4 blocks of width 128 over 8 x 8 images in 16 patches, pre-trained to name letters."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=len(letters.LETTERS),
    )
    model = ViTForImageClassification(config)
    data = letters.draw(_VIT_STEPS * _VIT_BATCH)
    train(model, shuffled_batches(data, _VIT_BATCH, _VIT_STEPS), _VIT_STEPS, _VIT_RATE)
    return model


def python_sources() -> list[bytes]:
    """The files of the standard library and NumPy, without tests, in an order drawn by a fixed seed."""
    roots = package_roots()
    files = [path for name in ("python", "numpy") for path in _files(roots[name])]
    random.Random(0).shuffle(files)
    return [path.read_bytes() for path in files]


def torch_prose(sizes: Sequence[int]) -> list[list[bytes]]:
    """The prose of PyTorch's docstrings, from so many files for each split: no file, and no text, is in two of them."""
    root = package_roots()["torch"]
    files = _files(root)
    random.Random(0).shuffle(files)
    seen: set[str] = set()
    splits, left = [], iter(files)
    for size in sizes:
        texts = []
        for path in itertools.islice(left, size):
            for passage in read_passages(path.read_bytes(), "torch", path.name):
                if passage.text not in seen:
                    seen.add(passage.text)
                    texts.append(passage.text.encode())
        splits.append(texts)
    return splits


def blocks(documents: Iterable[bytes], most: int | None = None) -> Columns:
    """The documents end to end, an END behind each, cut into at most `most` whole blocks of CONTEXT tokens."""
    stream = itertools.chain.from_iterable((*document, END) for document in documents)
    tokens = list(stream if most is None else itertools.islice(stream, most * CONTEXT))
    whole = len(tokens) // CONTEXT
    rows = torch.tensor(tokens[: whole * CONTEXT], dtype=torch.int64).view(whole, CONTEXT)
    return {"input_ids": rows, "labels": rows}


def _files(root: Path) -> list[Path]:
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in paths if _NOT_SOURCES.isdisjoint(path.parts)]
