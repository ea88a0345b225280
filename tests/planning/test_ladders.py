"""Rows of ladders against what real ladders keep, hold at their peak, train and weigh."""

from __future__ import annotations

import pytest
import torch

import tlfast
from benchmarks.memory import peak_bytes
from benchmarks.peers import training_step
from tests.planning.cases import BATCH, CONFIGS, LENGTH, REDUCTION, batch_of, job_of, ladder_of
from tlfast.bench.measure import saved_bytes
from tlfast.ladder.config import TAP_STORAGES
from tlfast.planning import STORAGES, ladder_rows, outline
from tlfast.training.averaging import WeightAverages

CASES = [(family, None) for family in CONFIGS] + [("bert", "token-classification")]
FEWER_BITS = ("bert", "llama", "gpt2", "t5")  # one of each shape: encoder, gated decoder, plain decoder, both
BUILT = [storage for storage in STORAGES if storage in TAP_STORAGES and storage != "offload"]  # that needs a GPU


def row_of(family, precision, storage, task=None, **settings):
    found = outline(CONFIGS[family], job_of(family, task), settings.get("layers", "all"))
    config = tlfast.LadderConfig(reduction=REDUCTION, **settings)
    return ladder_rows(found, config, [precision], [storage])[0]


@pytest.mark.parametrize(
    "family, task, precision", [*((*case, "fp32") for case in CASES), *((name, None, "bf16") for name in FEWER_BITS)]
)
def test_a_ladder_keeps_what_its_row_says(family, task, precision):
    row = row_of(family, precision, "keep", task)
    model, batch = ladder_of(family, precision, task), batch_of(family, task)
    step = training_step(model, batch)
    step()
    saved = saved_bytes(lambda: model(**batch))
    assert abs(row.saved - saved) <= 0.1 * saved, (row.saved, saved)
    held = peak_bytes(step) + row.optimizer
    assert abs(row.peak - held) <= 0.4 * held, (row.peak, held)
    assert row.trained == model.trainable_parameters()
    weights = model.backbone.weight_bytes() + 4 * row.trained
    assert abs(row.weights - weights) <= 0.05 * weights, (row.weights, weights)  # a pooler that no tap needs


@pytest.mark.parametrize("storage", BUILT)
def test_every_storage_keeps_what_its_row_says(storage):
    row = row_of("bert", "bf16", storage, tap_dim=48)
    model, batch = ladder_of("bert", "bf16", tap_storage=storage, tap_dim=48), batch_of("bert")
    model.calibrate([batch_of("bert")])
    model(**batch).loss.backward()
    saved = saved_bytes(lambda: model(**batch))
    assert abs(row.saved - saved) <= 0.1 * saved, (row.saved, saved)
    assert row.trained == model.trainable_parameters()


def test_a_side_network_in_bf16_keeps_taps_in_bf16():
    exact, row = (row_of("bert", "fp32", "keep", side_precision=precision) for precision in ("fp32", "bf16"))
    model, batch = ladder_of("bert", side_precision="bf16"), batch_of("bert")
    model(**batch).loss.backward()
    saved = saved_bytes(lambda: model(**batch))
    assert abs(row.saved - saved) <= 0.1 * saved, (row.saved, saved)
    assert row.saved < exact.saved - BATCH * LENGTH * 192 * 2 * 5 // 2


def test_fewer_rungs_keep_less():
    whole, half = (row_of("bert", "fp32", "keep", layers=layers) for layers in ("all", [1, 3]))
    model = ladder_of("bert", layers=[1, 3])
    model(**batch_of("bert")).loss.backward()
    saved = saved_bytes(lambda: model(**batch_of("bert")))
    assert abs(half.saved - saved) <= 0.1 * saved and half.trained == model.trainable_parameters() < whole.trained


def test_storages_are_in_their_order():
    found = outline(CONFIGS["bert"], job_of("bert"))
    rows = ladder_rows(found, tlfast.LadderConfig(reduction=REDUCTION, tap_dim=24), ["fp32"])
    saved = {row.setting["tap_storage"]: row.saved for row in rows}
    assert saved["keep"] > saved["int8"] > saved["offload"] > saved["stream"] < saved["project"] < saved["int8"]
    forwards = {row.setting["tap_storage"]: row.forwards for row in rows}
    assert forwards["stream"] - forwards["keep"] == pytest.approx(1)  # the second frozen forward
    assert all(1 < forwards[name] < 2 for name in ("keep", "int8", "project", "offload"))
    taps = 5 * BATCH * LENGTH * 192 * 4  # the embedding among them
    assert {row.setting["tap_storage"]: row.host for row in rows} == dict.fromkeys(saved, 0) | {"offload": taps}
    assert all(0 < row.cached_forwards < row.forwards - 0.9 for row in rows)


def test_the_cache_holds_every_tap_the_embedding_and_the_last_state():
    tap = LENGTH * 192  # BERT's last tap is its last state, Llama's is before the norm
    assert row_of("bert", "fp32", "keep").cache_sample == 4 * 5 * tap
    assert row_of("bert", "bf16", "keep").cache_sample == 2 * 5 * tap
    assert row_of("bert", "fp32", "int8").cache_sample == 5 * (tap + 4 * LENGTH)
    assert row_of("bert", "fp32", "keep", layers=[0, 2]).cache_sample == 4 * 4 * tap
    assert row_of("llama", "fp32", "keep").cache_sample == 4 * 6 * tap


def test_a_projection_wider_than_a_tap_is_refused():
    with pytest.raises(ValueError, match="tap_dim: 200 is more than the 192 channels"):
        row_of("bert", "fp32", "project", tap_dim=200)


def test_a_reduction_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="reduction: 7 does not divide"):
        ladder_rows(outline(CONFIGS["bert"], job_of("bert")), tlfast.LadderConfig(reduction=7), ["fp32"])


@pytest.mark.parametrize(
    "name, layers, samples", [("bert-base", "all", 16), ("t5-base", [1, 2, 3, 5, 6, 7, 9, 10, 11], 8)]
)
def test_real_dimensions(name, layers, samples):
    """Twelve blocks of width 768, r=8, dropout 0.1; of the ladder within 10 %."""
    import transformers as hf

    from tlfast.planning import Job

    torch.manual_seed(0)
    ids = torch.randint(3, 30_000, (samples, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bert-base":
        config, job, batch["labels"] = hf.BertConfig(), Job("sequence-classification", samples, 128), ids[:, 0] % 2
        model = hf.BertModel(config)
    else:
        config = hf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
        job, batch["labels"] = Job("seq2seq-lm", samples, 128, 4), ids[:, :4]
        model = hf.T5ForConditionalGeneration(config)
    settings = tlfast.LadderConfig(reduction=8, layers=layers, init="random")
    ladder = tlfast.LadderModel(tlfast.freeze(model), task=job.task, config=settings).train()
    saved = saved_bytes(lambda: ladder(**batch))
    row = ladder_rows(outline(config, job, layers), settings, ["fp32"], ["keep"])[0]
    assert abs(row.saved - saved) <= 0.1 * saved, (row.saved, saved)


def test_averages_of_the_weights_count_with_the_optimizer():
    found, config = outline(CONFIGS["bert"], job_of("bert"), "all"), tlfast.LadderConfig(reduction=REDUCTION)
    plain, averaged = (ladder_rows(found, config, ["fp32"], ["keep"], kept)[0] for kept in (False, True))
    real = sum(average.nbytes for average in WeightAverages(ladder_of("bert"), 0.9)._averages.values())
    assert averaged.optimizer - plain.optimizer == averaged.peak - plain.peak == real
    assert averaged.weights == plain.weights
