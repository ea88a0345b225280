"""Readers for text, pairs, tags, documents and images, and what turns them into batches."""

from .batches import IGNORED, PadBatch, stack_batch
from .blocks import cut_blocks, tokenise_prompts
from .choices import ChoiceDataset, Choices, PadChoices, read_choices
from .conll import Sentences, read_conll
from .documents import Documents, read_documents
from .errors import InputError
from .image_texts import ImageTexts, read_image_texts
from .images import Images, read_image_classes, read_images
from .label_sets import LabelSets, fit_label_sets
from .labels import Labels, fit_classes, fit_labels
from .pixels import ImageDataset
from .read import Examples, read_examples
from .seq2seq import tokenise_pairs
from .split import draw_tenth, split_dev, split_random, split_stratified
from .tokens import LengthBuckets, TokenDataset
from .words import encode_tags, fit_tags, tokenise_words
from .write import TABLES, check_suffix, format_conll, format_rows

__all__ = [
    "IGNORED",
    "TABLES",
    "ChoiceDataset",
    "Choices",
    "Documents",
    "Examples",
    "ImageDataset",
    "ImageTexts",
    "Images",
    "InputError",
    "LabelSets",
    "Labels",
    "LengthBuckets",
    "PadBatch",
    "PadChoices",
    "Sentences",
    "TokenDataset",
    "check_suffix",
    "cut_blocks",
    "draw_tenth",
    "encode_tags",
    "fit_classes",
    "fit_label_sets",
    "fit_labels",
    "fit_tags",
    "format_conll",
    "format_rows",
    "read_choices",
    "read_conll",
    "read_documents",
    "read_examples",
    "read_image_classes",
    "read_image_texts",
    "read_images",
    "split_dev",
    "split_random",
    "split_stratified",
    "stack_batch",
    "tokenise_pairs",
    "tokenise_prompts",
    "tokenise_words",
]
