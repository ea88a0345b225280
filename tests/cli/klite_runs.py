"""Small random image-text models and pictures on disk for the commands of klite."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf

from tests.cli.ladder_runs import save_backbone
from tests.contrastive import pictures
from tests.contrastive.two_towers import SIZES, VISION
from tests.knowledge.small_wordnet import write_wordnet

LETTERS = "abcdefghijklmnopqrstuvwxyz.,;-_"


def save_clip(folder: Path) -> Path:
    """A random CLIP of 77 tokens, letters, on pictures of 8 x 8."""
    folder.mkdir()
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = hf.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 1}
    text = {**SIZES, **ids, "vocab_size": len(tokens), "max_position_embeddings": 77}
    torch.manual_seed(0)
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 8, "width": 8}
    hf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    """A random ViT on pictures of 8 x 8."""
    torch.manual_seed(0)
    hf.ViTModel(hf.ViTConfig(**VISION)).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_all(folder: Path) -> Path:
    """clip, vit, bert, wordnet; train, dev and test of folders; captions.jsonl; unlabelled images."""
    save_clip(folder / "clip")
    save_vit(folder / "vit")
    save_backbone(folder / "bert")
    write_wordnet(folder / "wordnet")
    for seed, (name, count) in enumerate((("train", 12), ("dev", 4), ("test", 6))):
        pictures.class_folders(folder / name, count, seed)
    for file in (folder / "test" / "seal").iterdir():
        (folder / "flat").mkdir(exist_ok=True)
        (folder / "flat" / file.name).write_bytes(file.read_bytes())
    rows = [
        {"image": str(file.relative_to(folder)), "caption": f"the {file.parent.name.replace('_', ' ')} is a good bird"}
        for file in sorted((folder / "train").rglob("*.png"))
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
