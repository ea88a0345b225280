"""What a ladder keeps for its backward pass: the taps, and nine narrow tensors a block. Nothing else."""

import pytest
import torch
from transformers import BertConfig, BertModel

import tlfast
from tlfast import LadderConfig, LadderModel
from tlfast.bench.measure import saved_bytes

BATCH, SEQUENCE, WIDTH, BLOCKS, HEADS, REDUCTION = 4, 64, 192, 3, 6, 4
SIDE = WIDTH // REDUCTION
TOKENS = BATCH * SEQUENCE


def ladder(dropout):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": 768}
    backbone = tlfast.freeze(BertModel(BertConfig(**sizes, vocab_size=100)))
    return LadderModel(backbone, config=LadderConfig(reduction=REDUCTION, init="random", dropout=dropout)).train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_a_training_forward_keeps_the_formula_and_nothing_more(dropout, padded):
    model = ladder(dropout)
    ids = torch.randint(0, 100, (BATCH, SEQUENCE))
    mask = torch.ones_like(ids)
    if padded:
        mask[:, SEQUENCE // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(BATCH, dtype=torch.long)}
    model(**batch).loss.backward()
    kept = saved_bytes(lambda: model(**batch))

    taps = (BLOCKS + 1) * TOKENS * WIDTH * 4
    # the first s; then of each block z, q, k, v, the heads' output, the sum and result of both add & norms
    narrow = (9 * BLOCKS + 1) * TOKENS * SIDE * 4
    rows = BLOCKS * TOKENS * (2 * HEADS + 4) * 4  # of each block the attention's and the norms' two numbers a row
    norm_and_pooling = 3 * TOKENS * 4  # mean, rstd, pooling weights
    head = 8 * BATCH * WIDTH * 4  # the pooled vectors and the dropout's mask
    attention_maps = BLOCKS * BATCH * HEADS * SEQUENCE**2 * 4
    formula = taps + narrow + rows + norm_and_pooling
    assert formula <= kept <= formula + head
    assert head < attention_maps / BLOCKS, "the slack is too small for one attention map"
