"""Starting weights come from the backbone, without a backward pass."""

import pytest
import torch

import tlfast
from tests.models import batch, digest, tiny
from tlfast import LadderConfig, LadderModel
from tlfast.ladder.moments import measure


def make(init, reduction, family="bert", calibration=None):
    torch.manual_seed(3)
    config = LadderConfig(reduction=reduction, init=init)
    return LadderModel(tlfast.freeze(tiny(family)), config=config, calibration=calibration).eval()


def test_pruning_keeps_whole_rows_per_head():
    inputs = batch((30, 30, 30))
    model = make("prune", 4, calibration=[inputs])
    source = model.backbone.blocks[0].attention.self.query
    channels = model.side.rungs[0].weight.argmax(dim=1)
    assert torch.equal(model.side.rungs[0].weight.sum(dim=1), torch.ones(12))
    rows = source.weight[:, channels]
    ours = model.side.blocks[0].attention.qkv.weight[:12]
    found = [(rows == row).all(dim=1).nonzero().item() for row in ours]
    assert [row // 16 for row in found] == [0] * 4 + [1] * 4 + [2] * 4, "four rows of each of the three heads"


def test_pca_rungs_centre_and_whiten_nothing_but_rotate():
    inputs = batch((40, 40, 40))
    model = make("pca", 4, calibration=[inputs])
    weight = model.side.rungs[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(12), rtol=0, atol=1e-5)
    projected = torch.cat(
        [
            rung.weight @ tap.flatten(0, 1).T + rung.bias[:, None]
            for rung, tap in zip(model.side.rungs, model.backbone(**inputs).taps, strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(projected.mean(dim=1), torch.zeros(12), rtol=0, atol=1e-4)
    covariance = torch.cov(projected)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 * covariance.diagonal().max()
    assert covariance.diagonal().diff().le(1e-4).all(), "largest variance first"


def test_moments_ignore_padding():
    backbone, inputs = tlfast.freeze(tiny()), batch((4, 9))
    short = {"input_ids": inputs["input_ids"][:1, :4], "attention_mask": inputs["attention_mask"][:1, :4]}
    long = {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:]}
    together, apart = (measure(backbone, batches)["encoder"] for batches in ([inputs], [short, long]))
    assert together.count == apart.count == 13
    torch.testing.assert_close(together.covariance, apart.covariance, rtol=1e-5, atol=1e-7)
    for key, value in together.energy.items():
        torch.testing.assert_close(value, apart.energy[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init", ["prune", "pca"])
def test_the_first_batch_calibrates_once(init):
    lazy, inputs = make(init, 4), batch((9, 9))
    eager = make(init, 4, calibration=[inputs])
    assert not lazy.calibrated and eager.calibrated
    lazy(**inputs)
    assert lazy.calibrated
    for (name, ours), theirs in zip(lazy.side.named_parameters(), eager.side.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    before = digest(lazy.side)
    lazy(**batch((7, 3), seed=5))
    assert digest(lazy.side) == before


def test_random_needs_no_batch_and_inits_differ():
    assert make("random", 4).calibrated
    inputs = batch((9, 9))
    weights = [
        make(init, 4, calibration=[inputs]).side.blocks[0].attention.qkv.weight for init in ("random", "prune", "pca")
    ]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_calibration_changes_no_weight_of_the_backbone_and_builds_no_graph():
    backbone = tlfast.freeze(tiny())
    before = digest(backbone.model)
    model = LadderModel(backbone, config=LadderConfig(reduction=4), calibration=[batch((9, 5), labels=2)])
    assert digest(backbone.model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.zeros(0, 3, dtype=torch.long)}]])
def test_empty_calibration_is_a_clear_error(batches):
    with pytest.raises(ValueError, match="calibration"):
        make("prune", 4, calibration=batches)
