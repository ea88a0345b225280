"""A frozen backbone whose blocks FSDP2's fully_shard spreads over two processes, under a ladder that each has whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import tlfast
from tests.distributed import cases
from tlfast import LadderConfig, LadderModel

STEPS = 5
pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch's fully_shard does not run on the CPU"
)


def fully_shard(backbone):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for stack in backbone.stacks.values():
        for block in stack.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return backbone


def plain(output):
    parts = (output.encoder, output.decoder) if hasattr(output, "decoder") else (output,)
    return [tensor.numpy() for part in parts for tensor in (part.embedding, *part.taps, part.last_hidden_state)]


def run(rank, task, shard, storage):
    backbone = tlfast.freeze(cases.backbone(task))
    if shard:
        fully_shard(backbone)
    inputs = cases.share(cases.batch(task, 0), rank, 2)
    inputs.pop("labels")
    if task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    taps = plain(backbone(**inputs))
    torch.manual_seed(0)
    config = LadderConfig(reduction=2, dropout=0.0, tap_storage=storage)
    model = LadderModel(backbone, task=task, config=config)
    losses = cases.train(DistributedDataParallel(model), task, STEPS, rank, 2)
    sharded = {name for name, parameter in backbone.named_parameters() if hasattr(parameter, "full_tensor")}
    return taps, losses, cases.side_weights(model), backbone.fingerprint(), backbone.weight_bytes(), sharded


@pytest.mark.parametrize(("task", "storage"), [*((task, "keep") for task in cases.TASKS), ("causal-lm", "stream")])
def test_a_sharded_backbone_trains_the_same_ladder(two_processes, task, storage):
    kept_whole, sharded = (two_processes(run, task, shard, storage) for shard in (False, True))
    backbone = tlfast.freeze(cases.backbone(task))
    paths = [f"{stack.path}." for stack in backbone.stacks.values()]
    in_blocks = {name for name, _ in backbone.named_parameters() if any(path in name for path in paths)}
    for (taps, losses, weights, identity, size, _), ours in zip(kept_whole, sharded, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(taps, ours[0], strict=True))
        assert ours[1] == losses
        assert all(np.array_equal(ours[2][name], weight) for name, weight in weights.items())
        assert ours[3] == identity
        assert ours[5] == in_blocks, "after a forward the blocks are spread again"
        assert size / 2 < ours[4] < size


def load(rank, folder):
    backbone = fully_shard(tlfast.freeze(cases.backbone("causal-lm")))
    model = LadderModel.from_pretrained(folder, backbone=backbone)
    inputs = cases.batch("causal-lm", 1)
    inputs.pop("labels")
    return model(**inputs).logits.detach().numpy()


def test_a_saved_ladder_is_loaded_onto_a_sharded_backbone(two_processes, tmp_path):
    model = cases.ladder("causal-lm", init="random").eval()
    model.save_pretrained(tmp_path)
    inputs = cases.batch("causal-lm", 1)
    inputs.pop("labels")
    expected = model(**inputs).logits.detach().numpy()
    for logits in two_processes(load, tmp_path):
        assert logits == pytest.approx(expected, abs=1e-5)
