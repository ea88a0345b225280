"""A tag for every word of a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ...data import (
    IGNORED,
    Labels,
    PadBatch,
    Sentences,
    TokenDataset,
    encode_tags,
    fit_tags,
    format_conll,
    read_conll,
    tokenise_words,
)
from ..evaluation import keep
from ..token_scores import TagScoring
from .base import LabelledTask, Predictions


@dataclass(frozen=True)
class TagTask(LabelledTask):
    """Tags of words, in CoNLL files. token_column, tag_column: from 0, negative from the end."""

    name: ClassVar[str] = "token-classification"
    preprocessor_settings: ClassVar[Mapping[str, Any]] = {"add_prefix_space": True}  # byte-level ones take words so
    suffixes: ClassVar[tuple[str, ...]] = (".conll", ".tsv", ".txt", ".jsonl")

    token_column: int = 0
    tag_column: int = -1

    @classmethod
    def of(cls, max_length: int, backbone: str, token_column: int = 0, tag_column: int = -1) -> Self:
        """The task before it has seen data."""
        return cls(max_length, backbone, token_column=token_column, tag_column=tag_column)

    def fitted(self, train: Sentences) -> Self:
        """With the tags that the training data have."""
        return replace(self, labels=fit_tags(train))

    def settings(self) -> dict[str, Any]:
        """The columns."""
        return {"token_column": self.token_column, "tag_column": self.tag_column}

    def read(self, path: str | Path, labelled: bool) -> Sentences:
        """Read a CoNLL file."""
        return read_conll(path, self.token_column, self.tag_column if labelled else None)

    def dataset(self, records: Sentences, preprocessor: Any) -> TokenDataset:
        """Tokenise, the tag at the first token of a word."""
        targets = None if records.tags is None else encode_tags(self.known, records)
        return tokenise_words(records, preprocessor, self.max_length, targets)

    def collate(self, preprocessor: Any) -> PadBatch:
        """Pads token ids and tags."""
        return PadBatch.of(preprocessor, self.max_length, labels="tokens")

    def scoring(self, preprocessor: Any) -> TagScoring:
        """By entities, where the tags are BIO."""
        return TagScoring(self.known.names)

    def predict(self, model: Any, path: str | Path, preprocessor: Any) -> Predictions:
        """`tokens` and `tags` a sentence; one that is too long is read in pieces, so that no word lacks a tag."""
        sentences = self.read(path, labelled=False)
        collate, scoring = self.collate(preprocessor), self.scoring(preprocessor)
        tags: list[list[str]] = [[] for _ in sentences.words]
        open_ones = list(range(len(sentences)))
        while open_ones:
            words = [sentences.words[i][len(tags[i]) :] for i in open_ones]
            lines = [sentences.lines[i][len(tags[i]) :] for i in open_ones]
            dataset = tokenise_words(Sentences(sentences.path, words, None, lines), preprocessor, self.max_length)
            for i, row, marks in zip(open_ones, keep(model, dataset, collate, scoring), dataset.labels, strict=True):
                first_tokens = [tag for tag, mark in zip(row, marks, strict=False) if mark != IGNORED]
                tags[i] += [self.known.names[tag] for tag in first_tokens]
            open_ones = [i for i in open_ones if len(tags[i]) < len(sentences.words[i])]
        rows = [{"tokens": words, "tags": row} for words, row in zip(sentences.words, tags, strict=True)]
        return Predictions(rows, 0)

    def format(self, rows: list[dict[str, Any]], suffix: str) -> str:
        """CoNLL text, or one object a sentence in .jsonl."""
        return super().format(rows, suffix) if suffix == ".jsonl" else format_conll(rows)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Self:
        """From task.json."""
        labels = Labels(tuple(saved["labels"]["names"]))
        return cls(saved["max_length"], saved["backbone"], labels, saved["token_column"], saved["tag_column"])
