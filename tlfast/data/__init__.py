"""Readers for labelled text and what turns them into batches."""

from .errors import InputError
from .labels import Labels, fit_labels, split_dev
from .read import Examples, read_examples
from .tokens import LengthBuckets, PadBatch, TokenDataset
from .write import check_suffix, format_rows

__all__ = [
    "Examples",
    "InputError",
    "Labels",
    "LengthBuckets",
    "PadBatch",
    "TokenDataset",
    "check_suffix",
    "fit_labels",
    "format_rows",
    "read_examples",
    "split_dev",
]
