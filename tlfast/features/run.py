"""The loop: batches in, rows out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from .array import FeatureFile
from .extract import Extractor
from .inputs import Source, batches


def write_features(
    source: Source,
    extractor: Extractor,
    file: FeatureFile,
    settings: dict[str, Any],
    budget: int,
    resume: bool = False,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write the vectors of all examples to a file, in the source's order, or go on where an interrupted run stopped.

    settings: JSON types by which a resumed run knows that it is the same. budget: tokens of a batch. progress: called
    with how many more examples are done, first those of an earlier run.
    Raises InputError as FeatureFile.session does, and for an example that cannot be read.
    """
    with file.session((len(source), extractor.width), settings, resume):
        progress(file.done)
        with closing(batches(source, budget, file.done)) as ready:
            for indices, inputs, cut in ready:
                file.write(indices, extractor(inputs).cpu().numpy(), cut)
                progress(len(indices))
