"""tlfast plan: what training will take, before anything is trained, from a model's configuration alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import InputError
from .backbone import find_backbone
from .ladder_options import ladder_config, settings_of_the_user
from .output import emit, note, quiet_libraries

_WIDTH = 140
_REDUCTION = 8

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def plan(
    backbone: Annotated[
        str, typer.Option(help='Folder, config.json, Hugging Face name, or "minilm"; no weights are read.')
    ],
    batch: Annotated[int, typer.Option(help="Samples of a step.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sample; of an image they are counted.")] = 128,
    target_length: Annotated[
        int | None, typer.Option(help="Tokens of a target (seq2seq-lm); default: as --length.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="As in tlfast ladder train; default: what the model is for.")] = None,
    labels: Annotated[int, typer.Option(help="Classes of a classifier.")] = 2,
    reduction: Annotated[int, typer.Option(help="The side network is 1/r as wide as the backbone.")] = _REDUCTION,
    layers: Annotated[str, typer.Option(help='Blocks with a rung: "all" or indices, such as 1,3,5.')] = "all",
    decoder_layers: Annotated[str | None, typer.Option(help="The same of a decoder; default: as --layers.")] = None,
    tap_dim: Annotated[int, typer.Option(help='Width of a tap in the storage "project".')] = 96,
    side_precision: Annotated[str, typer.Option(help="Of the side network's products: fp32 or bf16.")] = "fp32",
    average: Annotated[
        float, typer.Option(help="Above 0, a ladder's averages of its weights are counted, as ladder train keeps them.")
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="Of the frozen weights, separated by commas.")] = "fp32,bf16,int8,nf4",
    storage: Annotated[
        str, typer.Option(help="How taps are kept, separated by commas.")
    ] = "keep,int8,project,stream,offload",
    dtype: Annotated[str, typer.Option(help="Of the peers' numbers, separated by commas.")] = "fp32,bf16",
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
    targets: Annotated[
        str | None, typer.Option(help="Layers LoRA adapts, separated by commas; default: queries and values.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Of the training data, for the size of the cache.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder, for plan.png and plan.json.")] = None,
    as_json: Json = False,
) -> None:
    """Say what fine-tuning, LoRA and every ladder would take: memory, disk for a cache, and time in frozen forwards."""
    quiet_libraries()
    from ..backbone.freezing import PRECISIONS
    from ..planning import STORAGES, Job, default_task, ladder_rows, outline, peer_rows
    from ..planning.peers import DTYPES

    for name, value in {"batch": batch, "length": length, "labels": labels, "rank": rank, "tap-dim": tap_dim}.items():
        _at_least_one(name, value)
    for name, given in {"samples": samples, "target-length": target_length}.items():
        if given is not None:
            _at_least_one(name, given)
    precisions, storages = _choices("precision", precision, PRECISIONS), _choices("storage", storage, STORAGES)
    dtypes = _choices("dtype", dtype, tuple(DTYPES))
    config = _read_config(backbone)
    task = task or default_task(config)
    if target_length is not None and task != "seq2seq-lm":
        raise InputError(f"--target-length: means nothing for {task}; leave it out")
    target = (target_length or length) if task == "seq2seq-lm" else 0
    if not 0 <= average < 1:
        raise InputError(f"--average {average}: pass a decay in [0, 1), such as 0.998, or leave it out")
    settings = ladder_config(reduction, layers, decoder_layers, "random", None, side_precision=side_precision)
    settings.tap_dim = tap_dim
    with settings_of_the_user():
        found = outline(config, Job(task, batch, length, target, labels), settings.layers, settings.decoder_layers)
        rows = ladder_rows(found, settings, precisions, storages, averaged=average > 0)
        chosen = None if targets is None else [name for name in targets.split(",") if name]
        rows = peer_rows(found, dtypes, rank, chosen) + rows
    job = found.job
    result = {
        "backbone": backbone,
        "model_type": config.model_type,
        "task": task,
        "batch": batch,
        "length": job.length,
        "target_length": job.target or None,
        "samples": samples,
        "rows": [_entry(row, samples) for row in rows],
    }
    title = f"{Path(backbone).name}, {task}: batch {batch} x {job.length}" + (f" to {job.target}" if target else "")
    lines = [] if as_json else _report(rows, title, batch, samples)
    if out is not None:
        _write(out, result, rows, title)
        lines.append(f"{out / 'plan.png'}, {out / 'plan.json'}")
    emit(result, lines, as_json)


def _read_config(name: str) -> Any:
    """The configuration of a folder, a file or a Hugging Face name, the cache before the network."""
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path)
    source = find_backbone(name)
    try:
        try:
            return AutoConfig.from_pretrained(source, local_files_only=True)
        except OSError:
            if Path(source).exists():
                raise
        note(f"the configuration of {source} is not in the cache; fetching it from Hugging Face")
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"backbone {name!r}: its configuration cannot be read ({_reason(error)})") from error


def _read_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is not the configuration of a transformers model ({_reason(error)}); pass its config.json"
        ) from error


def _reason(error: Exception) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()).partition(" Model type should be one of ")[0][:300]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"--{name} {value}: pass an integer of at least 1")


def _choices(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    found = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in found if name not in allowed]
    if unknown:
        raise InputError(f"--{option} {unknown[0]!r}: is not available; choose among {', '.join(allowed)}")
    return found


def _entry(row: Any, samples: int | None) -> dict[str, Any]:
    """A row as JSON types, with what follows from it."""
    cached = row.cache_sample is not None and samples is not None
    return row.to_dict() | {
        "total": row.weights + row.peak,
        "cache": row.cache_sample * samples if cached else None,
    }


def _report(rows: list[Any], title: str, batch: int, samples: int | None) -> list[str]:
    from rich.console import Console

    from ..bench.comparison import in_bytes
    from ..bench.plan_report import plan_table, smallest

    output = io.StringIO()
    Console(file=output, width=_WIDTH, color_system=None).print(plan_table(rows, title, batch, samples))
    host = [f"offload keeps {in_bytes(row.host / batch)} a sample in the host's memory" for row in rows if row.host]
    return [
        *(line.rstrip() for line in output.getvalue().splitlines()),
        *host[:1],
        "saved: for the backward pass, the result included. step, cached: operations, in forwards of the frozen model.",
        f"least memory: {smallest(rows)}",
    ]


def _write(out: Path, result: dict[str, Any], rows: list[Any], title: str) -> None:
    from ..bench.plan_report import draw_plan
    from ..training.folder import write_whole, writing_to

    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; pass a folder")
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        partial = out / ".plan.png.partial"
        try:
            draw_plan(partial, rows, title)
            partial.replace(out / "plan.png")
        finally:
            partial.unlink(missing_ok=True)
        write_whole(out / "plan.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
