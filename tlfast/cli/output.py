"""How commands speak: results on standard output, all else on standard error, bad input in one line with status 2."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import typer
import typer.core

from ..data.errors import InputError

# What the extra [train] brings; a bare installation has none of it.
_OPTIONAL = ("transformers", "huggingface_hub", "accelerate", "tqdm", "rich", "matplotlib", "PIL")


class Commands(typer.core.TyperGroup):
    """A group of commands whose InputErrors, and missing extras, end in one line on standard error and status 2.

    Every other exception is a mistake in the code and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command named on the command line."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _OPTIONAL:
                raise
            typer.echo(f'error: the package {package} is not installed; run pip install -e ".[train]"', err=True)
            raise typer.Exit(2) from error


def emit(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print a command's result: one JSON object, or lines for people."""
    typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))


def note(line: str) -> None:
    """Say something by the way, on standard error and clear of a progress bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def on_terminal() -> bool:
    """Whether somebody watches standard error, where progress bars go."""
    return sys.stderr.isatty()


def quiet_libraries() -> None:
    """Keep transformers and tokenizers from writing between a command's own lines; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|huggingface_hub|accelerate")
