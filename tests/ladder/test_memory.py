"""What a ladder keeps for its backward pass: the taps, and a few narrow tensors a block. Nothing else."""

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import tlfast
from benchmarks.memory import peak_bytes
from tlfast import LadderConfig, LadderModel
from tlfast.bench.measure import saved_bytes

BATCH, SEQUENCE, WIDTH, BLOCKS, HEADS, REDUCTION = 4, 64, 192, 3, 6, 4
SIDE = WIDTH // REDUCTION
TOKENS = BATCH * SEQUENCE


def encoder_ladder(dropout, blocks=BLOCKS, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": blocks, "num_attention_heads": HEADS, "intermediate_size": 768}
    backbone = tlfast.freeze(BertModel(BertConfig(**sizes, vocab_size=100)))
    settings = {"reduction": REDUCTION, "init": "random", "dropout": dropout} | settings
    return LadderModel(backbone, config=LadderConfig(**settings)).train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_a_training_forward_keeps_the_formula_and_nothing_more(dropout, padded):
    model = encoder_ladder(dropout)
    ids = torch.randint(0, 100, (BATCH, SEQUENCE))
    mask = torch.ones_like(ids)
    if padded:
        mask[:, SEQUENCE // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(BATCH, dtype=torch.long)}
    model(**batch).loss.backward()
    kept = saved_bytes(lambda: model(**batch))

    taps = (BLOCKS + 1) * TOKENS * WIDTH * 4
    # the first s; then of each block z, the heads' output, the sum before the last norm, and the result
    narrow = (4 * BLOCKS + 1) * TOKENS * SIDE * 4
    rows = BLOCKS * TOKENS * 2 * HEADS * 4  # of each block the attention's two numbers a row and head
    norm_and_pooling = 3 * TOKENS * 4  # mean, rstd, pooling weights
    head = 8 * BATCH * WIDTH * 4  # the pooled vectors and the dropout's mask
    attention_maps = BLOCKS * BATCH * HEADS * SEQUENCE**2 * 4
    formula = taps + narrow + rows + norm_and_pooling
    assert formula <= kept <= formula + head
    assert head < attention_maps / BLOCKS, "the slack is too small for one attention map"


def t5_ladder(d_model, heads, blocks, vocabulary, reduction, layers="all", dropout=0.1):
    config = T5Config(
        d_model=d_model,
        d_ff=4 * d_model,
        d_kv=d_model // heads,
        num_heads=heads,
        num_layers=blocks,
        vocab_size=vocabulary,
        decoder_start_token_id=0,
    )
    settings = LadderConfig(reduction=reduction, layers=layers, init="random", dropout=dropout)
    backbone = tlfast.freeze(T5ForConditionalGeneration(config))
    return LadderModel(backbone, task="seq2seq-lm", config=settings).train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_encoder_decoder_keeps_the_formula_and_nothing_more(dropout):
    torch.manual_seed(0)
    vocabulary, target = 60, 8
    model = t5_ladder(WIDTH, HEADS, BLOCKS, vocabulary, REDUCTION, dropout=dropout)
    ids, labels = (torch.randint(3, vocabulary, (BATCH, length)) for length in (SEQUENCE, target))
    mask = torch.ones_like(ids)
    mask[1:, SEQUENCE // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model(**batch).loss.backward()
    kept = saved_bytes(lambda: model(**batch))

    targets = BATCH * target
    taps = (BLOCKS + 1) * (TOKENS + targets) * WIDTH * 4
    end = 3  # the last s, normed without and with the factor
    narrow = (2 * BLOCKS + end) * (TOKENS + targets) * SIDE * 4  # of each block s and z
    rows = (TOKENS + targets) * 4  # the last norm's one number a row
    bias = (SEQUENCE**2 + target**2) * (HEADS * 4 + 8)  # one for all blocks and samples, and its int64 buckets
    masks = 2 * TOKENS
    read_by_head = 2 * targets * WIDTH * 4  # the last state, and the gradient that comes with the loss: no logits
    formula = taps + narrow + rows + bias + masks + read_by_head
    assert formula <= kept <= formula + 1024
    assert targets * SIDE * 4 > 1024, "the slack is too small for one more narrow tensor"


def test_t5_base_keeps_at_most_16_mib_a_sample():
    torch.manual_seed(0)
    model = t5_ladder(768, 12, 12, 32128, 8, layers=[1, 2, 3, 5, 6, 7, 9, 10, 11])
    samples = 8
    batch = {
        "input_ids": torch.randint(3, 32128, (samples, 128)),
        "attention_mask": torch.ones(samples, 128, dtype=torch.long),
        "labels": torch.randint(3, 32128, (samples, 4)),
    }
    assert saved_bytes(lambda: model(**batch)) <= 16 * 2**20 * samples


STORAGES = ("keep", "int8", "project", "stream")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("storage", STORAGES)
def test_of_a_tap_is_kept_what_its_storage_says(storage, dropout):
    width, tokens = 16, BATCH * SEQUENCE
    torch.manual_seed(0)
    model = encoder_ladder(dropout, tap_storage=storage, tap_dim=width)
    ids = torch.randint(0, 100, (BATCH, SEQUENCE))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(BATCH, dtype=torch.long)}
    model(**batch).loss.backward()
    kept = saved_bytes(lambda: model(**batch))

    a_token = {"keep": 4 * WIDTH, "int8": WIDTH + 4, "project": 4 * width, "stream": 0}[storage]
    taps = (BLOCKS + 1) * tokens * a_token
    s = BLOCKS if storage in ("keep", "int8") else 0  # the others' gates need z and the tap
    narrow = (3 * BLOCKS + s + 1) * tokens * SIDE * 4  # z, the heads' output, the sum before the last norm
    rows = BLOCKS * tokens * 2 * HEADS * 4
    formula = taps + narrow + rows + 3 * tokens * 4
    head = 8 * BATCH * WIDTH * 4
    assert formula <= kept <= formula + head


def test_a_stream_never_holds_the_taps_together():
    """The peaks of a whole step, forward and backward: of 13 taps that "keep" holds at once."""
    torch.manual_seed(0)
    steps = {}
    for storage in ("keep", "stream"):
        model = encoder_ladder(0.1, blocks=12, tap_storage=storage)
        ids = torch.randint(0, 100, (BATCH, SEQUENCE))
        batch = {"input_ids": ids, "labels": torch.zeros(BATCH, dtype=torch.long)}
        model(**batch).loss.backward()
        steps[storage] = peak_bytes(lambda model=model, batch=batch: model(**batch).loss.backward())
    tap = TOKENS * WIDTH * 4
    # the second forward needs some tensors of a tap's width of its own, when the taps would long be there
    assert steps["keep"] - steps["stream"] >= 6 * tap
