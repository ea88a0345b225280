"""tlfast embed: one vector for every text or image of a file, from a frozen backbone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError, read_examples, read_images
from .backbone import freeze_loaded, load_backbone
from .ladder_options import settings_of_the_user
from .output import emit, note, on_terminal, quiet_libraries

if TYPE_CHECKING:
    from ..features import Extractor, FeatureFile
    from ..features.inputs import Source

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def embed(
    backbone: Annotated[str, typer.Option(help='Folder or Hugging Face name of the frozen model, or "minilm".')],
    data_file: Annotated[
        Path,
        typer.Option("--data", help="Texts: .tsv, .csv or .jsonl with a header; or a folder of images, by name."),
    ],
    out: Annotated[Path, typer.Option(help="The .npy file to write: float32 (N, D), rows in the order of the data.")],
    pooling: Annotated[
        str | None,
        typer.Option(
            help="How tokens become one vector: mean, cls or last; default: last of causal models, cls of vision "
            "models with a class token, else mean."
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Read this block's output, negative from the end; default: the model's last hidden state."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    text_column: Annotated[str | None, typer.Option(help="Name of the column of texts; default: text.")] = None,
    pair_column: Annotated[
        str | None,
        typer.Option(
            help="Name of the column of second texts, which the model reads behind the first; default: text_pair, "
            "where there is one."
        ),
    ] = None,
    no_pairs: Annotated[bool, typer.Option("--no-pairs", help="Leave second texts out.")] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the frozen weights: fp32 (default), bf16, int8 or nf4; a prepared folder has its own."),
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a batch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    as_json: Json = False,
) -> None:
    """Sentence embeddings, or features of images, from a frozen backbone, at the speed of its forward."""
    quiet_libraries()
    from .. import features

    file = features.FeatureFile(out)
    records = _read(data_file, text_column, pair_column, no_pairs)
    source, extractor, settings = _prepare(records, data_file, backbone, precision, pooling, layer, normalize)
    budget = batch_tokens or features.BATCH_TOKENS[extractor.device]
    settings |= {"batch_tokens": budget, "columns": [text_column, pair_column, no_pairs]}
    start = time.perf_counter()
    before = _embed(source, extractor, file, settings, budget, resume, as_json)
    seconds = time.perf_counter() - start
    if file.cut:
        note(f"{data_file}: {file.cut} texts are longer than the model takes and were cut")
    result = {
        "out": str(out),
        "rows": len(source),
        "width": extractor.width,
        "pooling": extractor.pooling,
        "layer": extractor.layer,
        "normalized": normalize,
        "precision": extractor.backbone.precision,
        "truncated": file.cut,
        "resumed_at": before,
        "seconds": seconds,
        "rows_per_second": (len(source) - before) / seconds,
    }
    read = "the last hidden state" if extractor.layer is None else f"block {extractor.layer}"
    line = f"{len(source):,} x {extractor.width} in {out}: {extractor.pooling} of {read}, {seconds:.1f} s"
    emit(result, [f"{line}, {result['rows_per_second']:,.0f} a second"], as_json)


def _read(path: Path, text_column: str | None, pair_column: str | None, no_pairs: bool) -> Any:
    """Examples of a file, or the images of a folder; before the model is loaded, which takes longer."""
    if path.is_dir():
        given = {"--text-column": text_column, "--pair-column": pair_column, "--no-pairs": no_pairs}
        for option, value in given.items():
            if value:
                raise InputError(f"{option}: means nothing for images; leave it out")
        return read_images(path)
    if pair_column and no_pairs:
        raise InputError("--no-pairs: leaves out what --pair-column names; pass one of the two")
    text, pair = text_column or "text", pair_column or "text_pair"
    if pair_column == text:
        raise InputError(f"--pair-column {pair!r}: is the column of the first texts too; name another")
    alone = no_pairs or text == pair
    return read_examples(path, text, None, pair, False if alone else True if pair_column else None)


def _prepare(
    records: Any,
    path: Path,
    backbone: str,
    precision: str | None,
    pooling: str | None,
    layer: int | None,
    normalize: bool,
) -> tuple[Source, Extractor, dict[str, Any]]:
    """What is read, what reads it, and what a resumed run must have in common with the one it goes on with."""
    import torch

    from .. import features, training
    from ..data import Images

    images = isinstance(records, Images)
    loaded = load_backbone(backbone, preprocessor_class="AutoImageProcessor" if images else "AutoTokenizer")
    source: Source
    if images:
        source = features.ImageSource(records, loaded.tokenizer)
    else:
        source = features.TextSource(records, loaded.tokenizer, loaded.max_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frozen = freeze_loaded(loaded, precision, device)
    with settings_of_the_user():  # a pooling or a layer that is not there
        extractor = features.Extractor.of(frozen, pooling, layer, normalize, device)
    settings = {
        "backbone": loaded.name,
        "fingerprint": frozen.fingerprint(),
        "preprocessor": features.identify(loaded.tokenizer),
        "precision": frozen.precision,
        "data_sha256": training.file_digest(path),
        "pooling": extractor.pooling,
        "layer": extractor.layer,
        "normalize": normalize,
    }
    return source, extractor, settings


def _embed(
    source: Source,
    extractor: Extractor,
    file: FeatureFile,
    settings: dict[str, Any],
    budget: int,
    resume: bool,
    quiet: bool,
) -> int:
    """Write the features behind a progress bar; how many an earlier run had written. Ctrl-C ends with status 130."""
    from tqdm import tqdm

    from .. import features

    counts: list[int] = []
    with tqdm(total=len(source), unit="row", disable=quiet or not on_terminal()) as bar:

        def progress(count: int) -> None:
            counts.append(count)
            bar.update(count)

        try:
            features.write_features(source, extractor, file, settings, budget, resume, progress)
        except KeyboardInterrupt:
            kept = "run the same command with --resume to go on" if file.unfinished else "there is nothing to resume"
            note(f"interrupted; {kept}")
            raise typer.Exit(130) from None
    return counts[0]
