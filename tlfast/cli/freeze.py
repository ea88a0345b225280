"""tlfast freeze: prepare a backbone once, as a folder that every other command takes as --backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError, read_examples, read_images
from .backbone import LoadedBackbone, find_backbone, freeze_loaded, load_backbone
from .ladder_options import settings_of_the_user, task_kind
from .output import emit, on_terminal, quiet_libraries

if TYPE_CHECKING:
    from ..backbone import FrozenBackbone
    from ..training import Task

_EXAMPLES = 256  # of --calibration that are read: which columns are large hardly depends on more

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def freeze(
    backbone: Annotated[str, typer.Option(help='Folder or Hugging Face name of the model, or "minilm".')],
    precision: Annotated[str, typer.Option(help="Of the frozen weights: fp32, bf16, int8 or nf4.")],
    out: Annotated[Path, typer.Option(help="The folder to write; pass it as --backbone to the other commands.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="What it is for, as in tlfast ladder train: causal-lm and seq2seq-lm keep the language-model head; "
            "default: without a head, for texts or images by what the model reads."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help=f"For int8: texts, or a folder of images, of which the first {_EXAMPLES} say which columns of the "
            "activations are large; default: random tokens or noise."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Store a model's frozen weights in fewer bits, once; loading the folder then maps them and prepares nothing."""
    quiet_libraries()
    from ..backbone import FrozenBackbone, is_prepared
    from ..training.folder import writing_to

    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_prepared(out)):
        raise InputError(f"{out}: holds something else than a prepared backbone; pass another --out")
    kind = _kind(backbone, task)
    loaded = load_backbone(backbone, kind.model_class, kind.preprocessor_class)
    if isinstance(loaded.model, FrozenBackbone):
        raise InputError(f"--backbone {backbone}: is prepared already; pass the model it came from")
    float32 = sum(parameter.nbytes for parameter in loaded.model.parameters())
    start = time.perf_counter()
    batches = None if calibration is None else _calibration(calibration, loaded)
    with _bar(as_json, "preparing", "block") as progress:
        frozen = freeze_loaded(loaded, precision, calibration=batches, progress=progress)
    with _bar(as_json, "writing", "B", frozen.weight_bytes()) as progress, writing_to(out), settings_of_the_user():
        frozen.save_pretrained(out, loaded.tokenizer, progress)
    result = _result(frozen, float32, time.perf_counter() - start) | {"out": str(out)}
    emit(result, _report(result), as_json)


def _kind(backbone: str, task: str | None) -> type[Task]:
    """The task the folder is for; by default the one without a head that reads what the model reads."""
    from transformers import AutoConfig

    from ..training import TASKS

    if task is not None:
        return task_kind(task)
    source, config = find_backbone(backbone), None
    for where in ({"local_files_only": True}, {}):
        with suppress(OSError, ValueError):  # loading says what is wrong
            config = config or AutoConfig.from_pretrained(source, **where)
    sees = not hasattr(config, "vocab_size") and hasattr(config, "image_size")
    return TASKS["image-classification" if sees else "sequence-classification"]


def _calibration(path: Path, loaded: LoadedBackbone) -> list[dict[str, Any]]:
    from .. import features

    source: Any
    if path.is_dir():
        if loaded.max_length:
            raise InputError(f"--calibration {path}: is a folder, and the model reads texts; pass a file of texts")
        source = features.ImageSource(read_images(path), loaded.tokenizer)
    elif not loaded.max_length:
        raise InputError(f"--calibration {path}: the model reads images; pass a folder of them")
    else:
        source = features.TextSource(read_examples(path, label_column=None), loaded.tokenizer, loaded.max_length)
    batches = features.first_inputs(source, _EXAMPLES, features.BATCH_TOKENS["cpu"])
    if getattr(loaded.model.config, "is_encoder_decoder", False):
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


@contextmanager
def _bar(quiet: bool, what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], Any]]:
    """A progress bar on a terminal."""
    from tqdm import tqdm

    hidden = quiet or not on_terminal()
    with tqdm(desc=what, unit=unit, total=total, unit_scale=unit == "B", disable=hidden) as bar:
        yield bar.update


def _result(frozen: FrozenBackbone, float32: int, seconds: float) -> dict[str, Any]:
    rows = frozen.describe()
    return {
        "precision": frozen.precision,
        "weight_bytes": frozen.weight_bytes(),
        "model_bytes": float32,
        "blocks": len(rows),
        "packed_blocks": sum(row["path"] == "packed" for row in rows),
        "why_not_packed": sorted({row["why"] for row in rows if row["why"]}),
        "worst_weight_error": max(row["weight_error"] for row in rows),
        "fingerprint": frozen.fingerprint(),
        "seconds": seconds,
    }


def _report(result: dict[str, Any]) -> list[str]:
    sizes = f"{result['weight_bytes'] / 2**20:.1f} MiB of weights (the model {result['model_bytes'] / 2**20:.1f} MiB)"
    why = f" ({'; '.join(result['why_not_packed'])})" if result["why_not_packed"] else ""
    return [
        f"{result['precision']} backbone in {result['out']}: {sizes}, {result['seconds']:.1f} s",
        f"{result['packed_blocks']} of {result['blocks']} blocks run over packed tokens{why}; "
        f"weights are off by at most {100 * result['worst_weight_error']:.2f} % in a block",
    ]
