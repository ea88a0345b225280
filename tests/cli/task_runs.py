"""Tiny backbones on disk and data for the tasks beyond labelled texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

NUMBERS = [*"0123456789"]


def words_tokenizer(words: Sequence[str], specials: dict[str, str], closing: bool = False) -> PreTrainedTokenizerFast:
    """A token a word. specials: such as {"eos_token": "</s>"}; closing: put the end of text behind every text."""
    vocabulary = {token: i for i, token in enumerate([*specials.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials.get("unk_token", "<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closing:
        end = specials["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def save_gpt2(folder: Path, seed: int = 0, blocks: int = 2) -> Path:
    """A random GPT-2 whose tokenizer knows digits and has no padding token."""
    torch.manual_seed(seed)
    specials = {"eos_token": "<eos>", "unk_token": "<unk>"}
    config = GPT2Config(
        vocab_size=len(NUMBERS) + 2, n_embd=32, n_layer=blocks, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    words_tokenizer(NUMBERS, specials).save_pretrained(folder)
    return folder


def save_t5(folder: Path, seed: int = 0) -> Path:
    """A random T5 whose tokenizer knows digits."""
    torch.manual_seed(seed)
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = T5Config(
        vocab_size=len(NUMBERS) + 3, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = words_tokenizer(NUMBERS, specials, closing=True)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    return folder


def save_vit(folder: Path, seed: int = 0, blocks: int = 2) -> Path:
    """A random ViT for images of 16 x 16 pixels."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_conll(
    path: Path, count: int, seed: int, first: Sequence[str], last: Sequence[str], others: Sequence[str]
) -> Path:
    """A CoNLL file in which a first name, with or without a last name, is a person."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(count):
        lines = []
        for _ in range(draw.randint(1, 3)):
            lines += [f"{word} O" for word in draw.choices(others, k=draw.randint(1, 3))]
            lines.append(f"{draw.choice(first)} B-PER")
            lines += [f"{word} I-PER" for word in draw.choices(last, k=draw.randint(0, 1))]
        blocks.append("\n".join(lines))
    path.write_text("\n\n".join(blocks) + "\n")
    return path


def write_colours(folder: Path, count: int, seed: int) -> Path:
    """A folder with the classes blue and red: noise with more of either."""
    draw = torch.Generator().manual_seed(seed)
    for i in range(count):
        name = ("blue", "red")[i % 2]
        pixels = torch.randint(0, 160, (12, 20, 3), generator=draw)
        pixels[..., 0 if name == "red" else 2] += 90
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{i:03}.png")
    return folder


def count_up(start: int, length: int) -> str:
    """Digits that count up from `start`, again from 0 after 9."""
    return " ".join(NUMBERS[(start + i) % 10] for i in range(length))


def write_counting(path: Path, count: int, seed: int) -> Path:
    """A .txt file, or a .tsv of texts, in which digits count up."""
    draw = random.Random(seed)
    lines = [count_up(draw.randrange(10), draw.randint(5, 20)) for _ in range(count)]
    path.write_text("\n".join(["text", *lines] if path.suffix == ".tsv" else lines) + "\n")
    return path


def write_successors(path: Path, count: int, seed: int) -> Path:
    """A .tsv of digits and the digits that follow them."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        digits = [draw.randrange(10) for _ in range(draw.randint(1, 3))]
        rows.append(" ".join(map(str, digits)) + "\t" + " ".join(str((digit + 1) % 10) for digit in digits))
    path.write_text("text\tlabel\n" + "".join(f"{row}\n" for row in rows))
    return path
