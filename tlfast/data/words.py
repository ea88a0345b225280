"""Tagged words as token ids: the first token of a word carries its tag."""

from __future__ import annotations

from typing import Any

from .batches import IGNORED
from .conll import Sentences
from .entities import complete_scheme
from .errors import InputError
from .labels import Labels
from .tokens import TokenDataset, longer_than


def fit_tags(train: Sentences) -> Labels:
    """The tags as classes, sorted; of BIO tags both forms of every type, since a small file may lack some I-.

    Raises InputError where every word has the same tag.
    """
    tags = {tag for sentence in _tags(train) for tag in sentence}
    if len(tags) < 2:
        raise InputError(f"{train.path}: every word has the tag {min(tags)!r}; add words with at least one other tag")
    return Labels(tuple(sorted(complete_scheme(tags))))


def encode_tags(labels: Labels, sentences: Sentences) -> list[list[int]]:
    """The tags as class indices, a list a sentence; InputError, naming the line, for a tag that is not a class."""
    index, encoded = labels.index, []
    for tags, lines in zip(_tags(sentences), sentences.lines, strict=True):
        for tag, line in zip(tags, lines, strict=True):
            if tag not in index:
                raise InputError(f"{sentences.path}, line {line}: {labels.unknown(tag, 'tag')}")
        encoded.append([index[tag] for tag in tags])
    return encoded


def tokenise_words(
    sentences: Sentences, tokenizer: Any, max_length: int, targets: list[list[int]] | None = None
) -> TokenDataset:
    """Tokenise sentences given as words, special tokens included, at most max_length tokens.

    `labels` has a word's target at its first token and -100 elsewhere; without targets, 0 marks the first tokens. A
    word of which the tokenizer leaves nothing is read as an unknown one. Words beyond max_length have no token, and
    their sentences are counted as cut.
    Raises InputError for a tokenizer that cannot say which word a token is from.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the backbone's tokenizer, {type(tokenizer).__name__}, cannot say which word a token is from; "
            "pass a backbone with a tokenizer.json"
        )
    words, encoding = _encode(sentences, tokenizer)
    columns = {name: list(encoding[name]) for name in encoding}
    word_ids = [encoding.word_ids(i) for i in range(len(words))]
    cut = longer_than(columns["input_ids"], max_length)
    if cut:
        chosen = [words[i] for i in cut]
        short = tokenizer(chosen, is_split_into_words=True, truncation=True, max_length=max_length)
        for place, i in enumerate(cut):
            word_ids[i] = short.word_ids(place)
            for name, column in columns.items():
                column[i] = short[name][place]
    marks = [[0] * len(sentence) for sentence in words] if targets is None else targets
    columns["labels"] = [_at_first_tokens(*pair) for pair in zip(word_ids, marks, strict=True)]
    return TokenDataset(columns, cut)


def _encode(sentences: Sentences, tokenizer: Any) -> tuple[list[list[str]], Any]:
    """The words, and their encoding, in which each has a token."""
    words = [list(sentence) for sentence in sentences.words]
    encoding = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
    vanished = [(i, j) for i, row in enumerate(words) for j in {*range(len(row))} - {*encoding.word_ids(i)}]
    for i, j in vanished:
        if tokenizer.unk_token is None:
            raise InputError(
                f"{sentences.path}, line {sentences.lines[i][j]}: the tokenizer leaves nothing of {words[i][j]!r}; "
                "correct or remove the word"
            )
        words[i][j] = tokenizer.unk_token
    if vanished:
        encoding = tokenizer(words, is_split_into_words=True, truncation=False, verbose=False)
    return words, encoding


def _at_first_tokens(word_ids: list[int | None], targets: list[int]) -> list[int]:
    labels: list[int] = []
    previous = None
    for word in word_ids:
        labels.append(IGNORED if word is None or word == previous else targets[word])
        previous = word
    return labels


def _tags(sentences: Sentences) -> list[list[str]]:
    if sentences.tags is None:
        raise ValueError(f"{sentences.path} was read without tags; read it with them")
    return sentences.tags
