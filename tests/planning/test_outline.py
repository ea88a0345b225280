"""What a configuration says: tasks, lengths, images; and that nothing of a large model is ever there."""

from __future__ import annotations

import pytest
import transformers as hf

import tlfast
from benchmarks.memory import peak_bytes
from tests.models import CONFIGS as ALL
from tests.planning.cases import CONFIGS, job_of, task_of
from tlfast.planning import Job, default_task, ladder_rows, outline, peer_rows

LLAMA_70B = hf.LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    num_hidden_layers=80,
    vocab_size=128256,
    max_position_embeddings=8192,
)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_task_a_model_is_for(family):
    assert default_task(CONFIGS[family]) == task_of(family)


def test_a_model_of_70_billion_weights_is_planned_without_them():
    rows = []

    def plan():
        found = outline(LLAMA_70B, Job("causal-lm", 1, 2048))
        rows.extend(ladder_rows(found, tlfast.LadderConfig(reduction=16), ["nf4"]))
        rows.extend(peer_rows(found, ["bf16"], 8))

    assert peak_bytes(plan) < 16 * 2**20
    by_method = {row.method: row for row in rows}
    full = by_method["full fine-tuning"]
    assert full.trained == 70_553_706_496  # as Meta counts Llama-3-70B
    assert full.gradients == 4 * full.trained and full.optimizer == 8 * full.trained
    assert full.peak >= full.gradients + full.optimizer
    assert by_method["LoRA r=8, checkpointing"].saved < by_method["LoRA r=8"].saved / 5
    assert by_method["ladder r=16"].weights < by_method["LoRA r=8"].weights / 2


def test_an_image_is_as_long_as_its_patches():
    assert outline(CONFIGS["vit"], job_of("vit")).job.length == 8 * 8 + 1


@pytest.mark.parametrize(
    "family, task, words",
    [
        ("bert", "causal-lm", ["task", "causal-lm", "bert"]),
        ("bert", "seq2seq-lm", ["task", "seq2seq-lm", "bert"]),
        ("bert", "image-classification", ["task", "it reads text"]),
        ("vit", "sequence-classification", ["task", "it reads images"]),
        ("t5", "sequence-classification", ["task", "takes seq2seq-lm"]),
        ("bert", "flying", ["task", "'flying'", "allowed"]),
    ],
)
def test_a_task_that_does_not_fit_is_refused(family, task, words):
    with pytest.raises(ValueError) as error:
        outline(CONFIGS[family], Job(task, 2, 8, 4))
    for word in words:
        assert word in str(error.value)


def test_a_length_the_model_does_not_take_is_refused():
    with pytest.raises(ValueError, match="length: this bert model does not take 100 tokens"):
        outline(CONFIGS["bert"], Job("sequence-classification", 2, 100))


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="layers: 9 is not a block"):
        outline(CONFIGS["bert"], job_of("bert"), [1, 9])
    with pytest.raises(ValueError, match="decoder_layers: this model has one list"):
        outline(CONFIGS["bert"], job_of("bert"), "all", [1])


@pytest.mark.parametrize("family", sorted(set(ALL) - {"t5-encoder", "siglip-text"}))  # no AutoModel makes these two
def test_every_family_is_planned(family):
    config = ALL[family]
    task = default_task(config)
    found = outline(config, Job(task, 2, 12, 5 if task == "seq2seq-lm" else 0))
    rows = ladder_rows(found, tlfast.LadderConfig(reduction=2), ["nf4"], ["keep"]) + peer_rows(found, ["fp32"], 2)
    assert all(row.saved > 0 and row.peak >= row.saved and row.weights > 0 for row in rows)
