"""Text that continues text, and text that answers text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ...data import (
    Documents,
    Examples,
    InputError,
    PadBatch,
    TokenDataset,
    cut_blocks,
    draw_tenth,
    read_documents,
    read_examples,
    tokenise_pairs,
    tokenise_prompts,
)
from ..generation import generate_texts
from ..token_scores import NextTokenScoring, TargetScoring
from .base import ColumnsTask, Predictions, Task

_BLOCK_SIZE = 512
_NEW_TOKENS = 64


@dataclass(frozen=True)
class CausalTask(Task):
    """Running text, learned in blocks of tokens."""

    name: ClassVar[str] = "causal-lm"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".csv", ".tsv")  # what is written may have lines and tabs

    text_column: str = "text"
    block_size: int = _BLOCK_SIZE

    @classmethod
    def of(cls, max_length: int, backbone: str, text_column: str = "text", block_size: int | None = None) -> Self:
        """The task before it has seen data. block_size: None takes 512, or what the model takes where that is less."""
        if block_size is not None and not 2 <= block_size <= max_length:
            raise InputError(f"--block-size {block_size}: pass 2 to {max_length}, the model's greatest length")
        return cls(max_length, backbone, text_column, block_size or min(_BLOCK_SIZE, max_length))

    def settings(self) -> dict[str, Any]:
        """The column, and the tokens of a block."""
        return {"text_column": self.text_column, "block_size": self.block_size}

    def read(self, path: str | Path, labelled: bool) -> Documents:
        """Read a .txt file, or a column of a table."""
        return read_documents(path, self.text_column)

    def dataset(self, records: Documents, preprocessor: Any) -> TokenDataset:
        """Blocks of tokens."""
        return cut_blocks(records, preprocessor, self.block_size)

    def datasets(
        self, train: Documents, dev: Documents | None, preprocessor: Any, seed: int
    ) -> tuple[TokenDataset, TokenDataset]:
        """Without dev data a tenth of the blocks: there may be a single document."""
        blocks = self.dataset(train, preprocessor)
        if dev is not None:
            return blocks, self.dataset(dev, preprocessor)
        if len(blocks) < 10:
            raise InputError(
                f"{train.path}: {len(blocks)} blocks of {self.block_size} tokens are too few to split a dev set off; "
                "pass a dev file or a smaller --block-size"
            )
        return draw_tenth(blocks, seed)

    def collate(self, preprocessor: Any) -> PadBatch:
        """Pads token ids on the side the tokenizer says."""
        return PadBatch.of_decoder(preprocessor, self.max_length, preprocessor.padding_side)

    def scoring(self, preprocessor: Any) -> NextTokenScoring:
        """By the loss a token."""
        return NextTokenScoring()

    def predict(
        self, model: Any, path: str | Path, preprocessor: Any, max_new_tokens: int | None = None
    ) -> Predictions:
        """`prediction` a text: how it goes on, greedily."""
        count = min(_NEW_TOKENS, self.max_length // 2) if max_new_tokens is None else max_new_tokens
        check_new_tokens(count, self.max_length)
        prompts = tokenise_prompts(self.read(path, labelled=False), preprocessor, self.max_length - count)
        texts = generate_texts(model, prompts, self.collate(preprocessor), count, preprocessor)
        return Predictions([{"prediction": text} for text in texts], prompts.truncated)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Self:
        """From task.json."""
        return cls(saved["max_length"], saved["backbone"], saved["text_column"], saved["block_size"])


@dataclass(frozen=True)
class Seq2SeqTask(ColumnsTask):
    """Pairs of texts: what is read and what is to be written."""

    name: ClassVar[str] = "seq2seq-lm"
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".csv", ".tsv")  # what is written may have lines and tabs

    def settings(self) -> dict[str, Any]:
        """The columns."""
        return {"text_column": self.text_column, "label_column": self.label_column}

    def read(self, path: str | Path, labelled: bool) -> Examples:
        """Read two columns of a table; without labels one."""
        return read_examples(path, self.text_column, self.label_column if labelled else None, pairs=False)

    def dataset(self, records: Examples, preprocessor: Any) -> TokenDataset:
        """Token ids of both texts."""
        return tokenise_pairs(records, preprocessor, self.max_length)

    def collate(self, preprocessor: Any) -> PadBatch:
        """Pads both sides' token ids."""
        return PadBatch.of_decoder(preprocessor, self.max_length, "right")

    def scoring(self, preprocessor: Any) -> TargetScoring:
        """By the loss a target token; test files by exact matches too."""
        return TargetScoring(preprocessor)

    def predict(
        self, model: Any, path: str | Path, preprocessor: Any, max_new_tokens: int | None = None
    ) -> Predictions:
        """`prediction` a text: what is written for it, greedily."""
        count = min(_NEW_TOKENS, self.max_length // 2) if max_new_tokens is None else max_new_tokens
        check_new_tokens(count, self.max_length)
        dataset = self.dataset(self.read(path, labelled=False), preprocessor)
        texts = generate_texts(model, dataset, self.collate(preprocessor), count, preprocessor)
        return Predictions([{"prediction": text} for text in texts], dataset.truncated)


def check_new_tokens(count: int, max_length: int) -> None:
    """InputError where a text to be written leaves no room for what is read."""
    if not 1 <= count < max_length:
        raise InputError(f"--max-new-tokens {count}: pass 1 to {max_length - 1}; the model takes {max_length} tokens")
