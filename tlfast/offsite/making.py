"""The owner's first step: from a model to a bundle."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbone.calibration import made_up_batch
from ..training.evaluation import evaluating
from . import preprocessor as preprocessors
from .architecture import (
    MOST_BLOCKS,
    base_of,
    blocks_path,
    build,
    describe,
    fill,
    find_blocks,
    seeded,
    shortened,
    tensors_of,
)
from .block_map import BlockMap
from .bundle import Bundle, write_bundle, write_manifest
from .distil import Distillation, distil
from .folder import check_new, new_folder
from .manifest import DTYPE, FORMAT, VERSION
from .recipes import Recipe
from .seal import seal, seal_key


def make(
    model: nn.Module,
    adapter: tuple[int, int] = (2, 2),
    emulator: str = "keep:2",
    out: str | Path = "bundle",
    preprocessor: Any = None,
    distillation: Distillation | None = None,
    secret: bytes = b"",
    progress: Callable[[float], Any] = lambda loss: None,
) -> Bundle:
    """Write what a data owner needs to tune a model it does not have, and return it as the data owner will read it.

    model: a transformers model in float32 with one list of blocks: GPT-2, OPT, Llama, Qwen2, Mistral, BERT and its
        kin, T5's encoder, ViT, CLIP's towers; with or without its head. It is left as it is.
    adapter: how many of the first and of the last blocks will be trained; they are sent as they are.
    emulator: what is sent in place of the middle: "keep:N" of its blocks or "keep:all", "svd:RANK" of its matrices,
        "prune:FRACTION" of its feed-forwards' channels, "int8" or "nf4" for its matrices.
    out: a new folder. preprocessor: a fast tokenizer or an image processor, to be sent with it.
    distillation: how the middle is trained to give what the full one gives; None for an emulator without any data.
        progress is called with the loss of each of its steps.
    secret: where others may hold the model, such as a public one: bytes that `plug` will need again.
    Embeddings, final norm and head are sent too, as they are. Raises ValueError for what cannot be done, naming the
    argument, TypeError for another kind of model, InputError where `out` exists or cannot be written.
    Source: Xiao, Lin, Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023 (arXiv 2302.04870).
    """
    recipe = Recipe.of(emulator)
    check_model(model)
    blocks = recipe.block_map(len(find_blocks(model).blocks), adapter)
    if blocks.total > MOST_BLOCKS:
        raise ValueError(f"model: it has {blocks.total} blocks, and a bundle takes at most {MOST_BLOCKS}")
    described = shortened(describe(model), blocks.kept, blocks.total)
    small = shorter_copy(model, described, blocks)
    check_same(model, small, blocks)
    described_preprocessor, tokenizer = (None, None) if preprocessor is None else preprocessors.describe(preprocessor)
    check_new(Path(out))
    encoded = recipe.apply(small, blocks)
    if distillation is not None:
        with evaluating(model):
            encoded = distil(model, small, blocks, encoded, distillation, progress)
    distilled = None if distillation is None else distillation.to_dict()
    manifest = _manifest(described, blocks, {"recipe": emulator, "distilled": distilled}, described_preprocessor)
    with new_folder(Path(out)) as folder:
        write_bundle(folder, manifest, small, encoded, tokenizer)
        manifest["seal"] = seal(manifest, seal_key(model, secret))
        write_manifest(folder, manifest)
        return Bundle.read(folder)


def _manifest(
    described: dict[str, Any], blocks: BlockMap, emulator: dict[str, Any], preprocessor: dict[str, Any] | None
) -> dict[str, Any]:
    """All of a manifest but what is said of the files."""
    import transformers

    from .. import __version__

    return {
        "format": FORMAT,
        "version": VERSION,
        "tlfast": __version__,
        "transformers": transformers.__version__,
        "model": described,
        "dtype": DTYPE,
        "blocks": blocks.to_dict(),
        "emulator": emulator,
        "preprocessor": preprocessor,
        "nonce": secrets.token_hex(16),
    }


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError for a model that cannot be sent."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; pass a transformers model")
    find_blocks(model)
    for name, tensor in tensors_of(model).items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"model: {name} is {tensor.dtype}, and float32 is sent; call model.float()")
        if not bool(tensor.detach().isfinite().all()):
            raise ValueError(f"model: {name} holds NaN or infinity; look where the model comes from")


def shorter_copy(model: Any, described: dict[str, Any], blocks: BlockMap) -> Any:
    """The model of the description with the weights of the blocks it kept.

    What the configuration makes and the model does not have is drawn at random from a fixed seed: a pooler, which
    transformers too draws where it is missing. Raises ValueError where anything else is missing or left over.
    """
    small = build(described)
    own, path = tensors_of(model), blocks_path(small)
    if path != blocks_path(model):
        raise ValueError(f"model: its blocks are at {blocks_path(model)}, and transformers makes them at {path}")
    names = {name: full_name(name, path, blocks) for name in tensors_of(small)}
    missing = [name for name, full in names.items() if full not in own]
    wrong = next((name for name in missing if "pooler." not in name), None)
    left = next((n for n in own if block_of(n, path) is None and n not in names.values()), None)
    if wrong is not None or left is not None:
        raise ValueError(
            f"model: it has {'no ' if left is None else ''}{wrong or left}, unlike what transformers makes of its "
            "configuration; pass a model whose structure was not changed"
        )
    with seeded(0), torch.no_grad():
        for name in missing:
            tensors_of(small)[name].normal_(std=0.02)
    fill(small, {name: own[full].detach() for name, full in names.items() if full in own})
    return small


def full_name(name: str, path: str, blocks: BlockMap) -> str:
    """What a tensor of an emulator is called in the full model. path: of the list of blocks."""
    place = block_of(name, path)
    if place is None:
        return name
    rest = name[len(f"{path}.{place}") :]
    return f"{path}.{blocks.kept[place]}{rest}"


def block_of(name: str, path: str) -> int | None:
    """The index of the block that a tensor is in; None where it is in none."""
    if not name.startswith(f"{path}."):
        return None
    return int(name[len(path) + 1 :].partition(".")[0])


@torch.no_grad()
def check_same(model: Any, small: Any, blocks: BlockMap) -> None:
    """Run the emulator before it is compressed, and the full model without the same blocks, on one made-up batch.

    Raises ValueError where they differ: a setting that the bundle cannot carry, or a block that computes by its number.
    """
    batch = made_up_batch(base_of(model))
    if batch is None:
        return
    with evaluating(model), _without(model, set(range(blocks.total)) - set(blocks.kept)):
        expected = base_of(model)(**batch)[0]
    difference = (base_of(small)(**batch)[0] - expected).abs().max().item()
    if not difference <= 1e-4 * (1 + expected.abs().max().item()):
        raise ValueError(
            f"model: without its left-out blocks it computes something else than the emulator (by {difference:.2g}): "
            "a setting is read that cannot be sent, or blocks depend on their number"
        )


@contextmanager
def _without(model: Any, left_out: set[int]) -> Iterator[None]:
    """Inside, these blocks give what they are given."""

    def skip(_block: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = find_blocks(model).blocks
    handles = [blocks[index].register_forward_hook(skip, with_kwargs=True) for index in left_out]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
