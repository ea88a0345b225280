"""Tags on tokens, pairs of texts, and batches of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tlfast.data import (
    Examples,
    InputError,
    Labels,
    PadBatch,
    Sentences,
    TokenDataset,
    encode_tags,
    fit_tags,
    split_random,
    tokenise_pairs,
    tokenise_words,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]) + "\n")
    return transformers.BertTokenizer(str(path))


def sentences(words, tags=None):
    lines, number = [], 1
    for sentence in words:
        lines.append(list(range(number, number + len(sentence))))
        number += len(sentence) + 1
    return Sentences(Path("a.conll"), words, tags, lines)


def test_the_first_token_of_a_word_carries_its_tag(tokenizer):
    data = tokenise_words(sentences([["acc", "b"], ["b"]]), tokenizer, 16, [[3, 4], [5]])
    assert data.columns["input_ids"] == [[2, 5, 7, 7, 6, 3], [2, 6, 3]]
    assert data.labels == [[-100, 3, -100, -100, 4, -100], [-100, 5, -100]]
    marks = tokenise_words(sentences([["acc", "b"], ["b"]]), tokenizer, 16)
    assert marks.labels == [[-100, 0, -100, -100, 0, -100], [-100, 0, -100]]


def test_sentences_that_are_too_long_are_cut_and_counted(tokenizer, capfd):
    data = tokenise_words(sentences([["b"], ["a", "b", "acc", "b"]]), tokenizer, 6, [[1], [1, 2, 3, 4]])
    assert data.columns["input_ids"] == [[2, 6, 3], [2, 5, 6, 5, 7, 3]]
    assert data.labels == [[-100, 1, -100], [-100, 1, 2, 3, -100, -100]]
    assert (data.cut, data.truncated, data.lengths) == ((1,), 1, [3, 6])
    assert capfd.readouterr() == ("", "")


def test_a_word_of_which_nothing_is_left_is_unknown(tokenizer):
    given = sentences([["a", "\u200b", "b"]])
    data = tokenise_words(given, tokenizer, 16, [[1, 2, 3]])
    assert data.columns["input_ids"] == [[2, 5, 1, 6, 3]]
    assert data.labels == [[-100, 1, 2, 3, -100]]
    assert given.words == [["a", "\u200b", "b"]]


def test_a_word_of_which_nothing_is_left_is_refused_where_none_is_unknown(tokenizer):
    from tokenizers import Tokenizer, models, normalizers

    bare = Tokenizer(models.WordLevel({"a": 0}))
    bare.normalizer = normalizers.Replace("x", "")
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=bare)
    with pytest.raises(InputError, match=r"a\.conll, line 2: the tokenizer leaves nothing of 'x'; correct or remove"):
        tokenise_words(sentences([["a", "x"]]), bare, 16)


def test_a_tokenizer_that_cannot_map_tokens_to_words_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"tokenizer, Slow, cannot say which word a token is from; pass a backbone"):
        tokenise_words(sentences([["a"]]), Slow(), 16)


def test_byte_level_tokenizers_read_words_as_within_a_text(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tlfast.training.tasks.tags import TagTask

    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_.train_from_iterator([" good film"] * 3, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    transformers.GPT2Tokenizer(vocab=bytes_.get_vocab(), merges=merges(bytes_)).save_pretrained(tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, **TagTask.preprocessor_settings)
    data = tokenise_words(sentences([["good", "film"]]), read, 16, [[1, 2]])
    assert read.convert_ids_to_tokens(data.columns["input_ids"][0]) == ["\u0120good", "\u0120film"]
    assert data.labels == [[1, 2]]


def merges(tokenizer):
    """The merges of a BPE tokenizer, as pairs."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def test_tags_are_sorted_and_bio_is_completed():
    assert fit_tags(sentences([["a", "b"]], [["O", "B-X"]])).names == ("B-X", "I-X", "O")
    assert fit_tags(sentences([["a", "b"], ["a"]], [["VB", "NN"], ["10"]])).names == ("10", "NN", "VB")


def test_tags_are_encoded_by_their_place():
    labels = Labels(("NN", "VB"))
    assert encode_tags(labels, sentences([["a", "b"], ["a"]], [["VB", "NN"], ["VB"]])) == [[1, 0], [1]]
    with pytest.raises(InputError, match=r"a\.conll, line 4: the tag 'X' is not in the training data, which has 'NN'"):
        encode_tags(labels, sentences([["a", "b"], ["a"]], [["VB", "NN"], ["X"]]))


def test_a_single_tag_is_refused():
    with pytest.raises(InputError, match="every word has the tag 'O'; add words with at least one other tag"):
        fit_tags(sentences([["a", "b"]], [["O", "O"]]))


def test_sentences_without_tags_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="read without tags") as caught:
        fit_tags(sentences([["a"]]))
    assert not isinstance(caught.value, InputError)


def test_a_tenth_of_the_sentences_is_drawn():
    given = sentences([[str(i)] for i in range(30)])
    rest, dev = split_random(given, seed=3)
    assert len(dev) == 3
    assert sorted(rest.words + dev.words) == sorted(given.words)
    assert split_random(given, seed=3)[1].words == dev.words
    assert split_random(given, seed=4)[1].words != dev.words
    with pytest.raises(InputError, match="9 sentences are too few to split a dev set off; pass a dev file"):
        split_random(given.select(range(9)), seed=3)


# batches


def test_tags_are_padded_with_their_tokens(tokenizer):
    pad = PadBatch.of(tokenizer, 16, labels="tokens")
    data = tokenise_words(sentences([["a"], ["a"] * 7]), tokenizer, 16, [[1], [1] * 7])
    batch = pad([data[0], data[1]])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 16))
    assert batch["labels"][0].tolist() == [-100, 1] + [-100] * 14


def test_sets_of_labels_are_stacked(tokenizer):
    pad = PadBatch.of(tokenizer, 16)
    batch = pad([{"input_ids": [1], "labels": [1.0, 0.0]}, {"input_ids": [1, 2], "labels": [0.0, 0.0]}])
    assert batch["labels"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert batch["labels"].dtype == torch.float32


class Decoder:
    """What padding asks of a tokenizer."""

    def __init__(self, pad=None, eos=9):
        self.pad_token_id, self.eos_token_id, self.pad_token_type_id = pad, eos, 0


@pytest.mark.parametrize(("pad", "fill"), [(None, 9), (0, 0)])
def test_language_models_are_padded_on_either_side(pad, fill):
    items = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in ([1, 2], [3, 4, 5, 6])]
    left = PadBatch.of_decoder(Decoder(pad), 6, "left")(items)
    assert left["input_ids"][0].tolist() == [fill] * 4 + [1, 2]
    assert left["attention_mask"][0].tolist() == [0] * 4 + [1, 1]
    assert left["labels"][0].tolist() == [-100] * 4 + [1, 2]
    right = PadBatch.of_decoder(Decoder(pad), 6, "right")(items)
    assert right["input_ids"][1].tolist() == [3, 4, 5, 6, fill, fill]
    assert right["labels"][1].tolist() == [3, 4, 5, 6, -100, -100]


def test_a_tokenizer_with_nothing_to_pad_with_is_refused():
    with pytest.raises(InputError, match="neither a padding token nor an end of text; add one of them"):
        PadBatch.of_decoder(Decoder(eos=None), 6, "right")


# pairs of texts


class Letters:
    """A tokenizer for which every letter is a token; targets are upper-case to it."""

    pad_token_id, eos_token_id, pad_token_type_id = 0, 1, 0

    def __call__(self, texts=None, pair=None, text_target=None, truncation=False, max_length=None, verbose=True):
        rows = [[ord(c) for c in text] for text in texts or [text.upper() for text in text_target]]
        rows = [row[:max_length] if truncation else row for row in rows]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}


def test_targets_are_tokenised_as_targets_and_both_sides_are_cut():
    examples = Examples(Path("a.tsv"), ["a", "abcd", "a", "abcd"], None, ["x", "x", "xyzz", "xyzz"], [2, 3, 4, 5])
    data = tokenise_pairs(examples, Letters(), 3)
    assert [bytes(ids).decode() for ids in data.columns["input_ids"]] == ["a", "abc", "a", "abc"]
    assert [bytes(ids).decode() for ids in data.labels] == ["X", "X", "XYZ", "XYZ"]
    assert data.cut == (1, 2, 3)
    batch = PadBatch.of_decoder(Letters(), 3, "right")([data[1], data[0]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 3)
    assert batch["labels"][0].tolist() == [ord("X"), -100, -100]


def test_sources_alone_have_no_targets():
    examples = Examples(Path("a.tsv"), ["a", "abcd"], None, None, [2, 3])
    data = tokenise_pairs(examples, Letters(), 3)
    assert "labels" not in data.columns
    assert isinstance(data, TokenDataset)
    assert data.cut == (1,)
