"""What an audit finds in bundles of which it is known what they give away."""

import pytest
import torch

from tests.models import inputs_of, tiny
from tlfast.data import InputError
from tlfast.offsite import Distillation, architecture, make
from tlfast.offsite.audit import AS_GOOD, audit, fidelity
from tlfast.offsite.audit_picture import draw_audit


@pytest.fixture(scope="module")
def model():
    return tiny("bert", num_hidden_layers=6)


def matrices(findings):
    return [found for found in findings if found.part == "middle" and len(found.shape) > 1]


def test_dropped_layers_are_sent_to_the_bit(model, tmp_path):
    found = audit(make(model, (1, 1), "keep:2", tmp_path / "b"), model)
    assert found.verbatim_matrices == found.revealed_matrices == 0.5
    for finding in matrices(found.findings):
        assert finding.cosine == 1.0 and finding.equal == torch.Size(finding.shape).numel()
        assert finding.nearest == finding.name.replace("layer.2", "layer.4") and finding.block in (1, 4)


def test_the_whole_middle_is_all_of_it(model, tmp_path):
    assert audit(make(model, (1, 1), "keep:all", tmp_path / "b"), model).verbatim == 1.0


def test_zeros_count_neither_as_sent_nor_as_missing(tmp_path):
    model = tiny("bert", num_hidden_layers=6)
    for layer in model.encoder.layer:
        layer.intermediate.dense.weight.data[::2] = 0
    assert audit(make(model, (1, 1), "keep:all", tmp_path / "a"), model).verbatim_matrices == 1.0
    fewer = audit(make(model, (1, 1), "int8", tmp_path / "b"), model)
    assert fewer.revealed_matrices == 1.0 and fewer.verbatim_matrices < 0.1


def test_a_middle_of_zeros_gives_nothing_away(tmp_path):
    model = tiny("bert", num_hidden_layers=3)
    for parameter in model.encoder.layer[1].parameters():
        parameter.data.zero_()
    found = audit(make(model, (1, 1), "keep:all", tmp_path / "b"), model)
    assert found.verbatim == found.revealed_matrices == 0.0


@pytest.mark.parametrize("recipe", ["int8", "nf4"])
def test_fewer_bits_hide_nothing(recipe, model, tmp_path):
    found = audit(make(model, (1, 1), recipe, tmp_path / "b"), model)
    assert found.verbatim_matrices < 0.1 and found.revealed_matrices == 1.0
    assert all(finding.cosine > AS_GOOD and finding.nearest == finding.name for finding in matrices(found.findings))


def test_low_rank_is_neither_to_the_bit_nor_as_good(model, tmp_path):
    bundle = make(model, (1, 1), "svd:8", tmp_path / "b")
    found = audit(bundle, model)
    assert found.verbatim_matrices == 0.0 and found.revealed_matrices == 0.0
    assert 0 < found.verbatim < 0.05, "norms and biases are sent as they are"
    for finding in matrices(found.findings):
        own, sent = (architecture.tensors_of(m)[finding.name].double() for m in (model, bundle.model))
        assert finding.nearest == finding.name
        assert finding.cosine == pytest.approx(float((own * sent).sum() / own.norm() / sent.norm()), rel=1e-9)


def test_pruned_channels_are_not_sent_and_the_others_are(model, tmp_path):
    found = audit(make(model, (1, 1), "prune:0.5", tmp_path / "b"), model)
    shares = [(f.equal / torch.Size(f.shape).numel(), "intermediate" in f.name or "output.dense" in f.name) for f in
              matrices(found.findings) if "attention" not in f.name]  # fmt: skip
    assert shares and all(share == 0.5 and feed_forward for share, feed_forward in shares)


def test_distilled_weights_are_near_and_not_the_same(model, tmp_path):
    settings = Distillation([inputs_of("bert", seed) for seed in range(3)], 6, 1e-3)
    found = audit(make(model, (1, 1), "keep:2", tmp_path / "b", distillation=settings), model)
    assert found.verbatim_matrices < 0.01 and found.revealed_matrices == 0.5
    assert {f.nearest for f in matrices(found.findings)} == {
        f.name.replace("layer.2", "layer.4") for f in matrices(found.findings)
    }


def test_adapter_and_embeddings_are_reported_as_sent(model, tmp_path):
    found = audit(make(model, (1, 1), "svd:8", tmp_path / "b"), model)
    assert {f.part for f in found.findings} == {"first", "middle", "last", "rest"}
    assert all(f.cosine == 1.0 for f in found.findings if f.part != "middle")


def test_fidelity(tmp_path):
    model = tiny("gpt2", n_layer=5)
    whole = fidelity(
        make(model, (1, 1), "keep:all", tmp_path / "a"), model, [inputs_of("gpt2", 1), inputs_of("gpt2", 2)]
    )
    assert whole["hidden_cosine"] == pytest.approx(1) and whole["emulator_perplexity"] == whole["model_perplexity"]
    batch = inputs_of("gpt2", 1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = fidelity(make(model, (1, 1), "keep:1", tmp_path / "b"), model, [batch])
    assert found["hidden_cosine"] < 0.99
    assert found["model_perplexity"] == pytest.approx(model(**batch, labels=labels).loss.exp().item(), rel=1e-5)


def test_the_picture_and_the_numbers(model, tmp_path):
    found = audit(make(model, (1, 1), "keep:2", tmp_path / "b"), model)
    draw_audit(tmp_path / "audit.png", found)
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert found.to_dict()["verbatim_matrices"] == 0.5 and len(found.to_dict()["tensors"]) == len(found.findings)


@pytest.mark.parametrize(("recipe", "columns"), [("keep:1", 0), ("keep:2", 2), ("svd:12", 0)])
def test_the_picture_shows_what_is_not_sent(recipe, columns, model, tmp_path):
    from matplotlib.image import imread

    draw_audit(tmp_path / "audit.png", audit(make(model, (1, 1), recipe, tmp_path / "b"), model))
    pixels = imread(tmp_path / "audit.png")[..., :3]
    grey = (abs(pixels - 0.92) < 0.01).all(-1)
    middle = grey[grey.shape[0] // 2]  # a row through the cells
    edges = int((middle[1:] & ~middle[:-1]).sum())
    assert (grey.mean() > 0.1) == (columns > 0) and (edges == columns or not columns)


def test_another_model_is_refused(model, tmp_path):
    bundle = make(model, (1, 1), "keep:2", tmp_path / "b")
    with pytest.raises(InputError, match="was not made of this model"):
        audit(bundle, tiny("bert", seed=1, num_hidden_layers=6))
