"""What the suites of the frozen forward compute, against figures known beforehand."""

import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from benchmarks import bench_precision, frozen
from tests.models import batch, tiny


def test_the_error_is_that_of_the_worst_layer_over_all_batches():
    errors = frozen.TapErrors()
    ones = torch.ones(3, 4, dtype=torch.float64)
    errors.add([ones, 1.1 * ones], [ones, ones])
    errors.add([ones, ones], [ones, ones])
    assert math.isclose(errors.worst, 0.1 / math.sqrt(2))


def test_hidden_states_are_the_blocks_outputs_without_padding():
    model, inputs = tiny("bert"), batch()
    found = frozen.hidden_states(model, inputs)
    assert [tuple(hidden.shape) for hidden in found] == [(26, 48)] * 3
    with torch.no_grad():
        last = model(**inputs).last_hidden_state
    assert torch.equal(found[-1], last[inputs["attention_mask"].bool()])


def test_the_flops_are_those_of_the_linear_layers():
    tokens, model = 26, tiny("bert")
    layers = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert frozen.gemm_flops(tokens, 3, 48, 96) == sum(2 * tokens * layer.weight.numel() for layer in layers)


def test_the_rates_are_there():
    rates = frozen.gemm_rates(tokens=32, width=16, hidden=64, rounds=1)
    assert set(rates) == {"fp32", "bf16", "int8"}
    assert all(rate > 0 for rate in rates.values())


def test_a_precision_that_is_refused_says_why():
    assert "precision: 'fp3' is not available" in frozen.freeze_or_reason(tiny(), "fp3")
    assert frozen.freeze_or_reason(tiny(), "fp32").weight_bytes() > 0


def test_the_pooler_does_not_count():
    model = tiny("bert")
    counted = [p for name, p in model.named_parameters() if not name.startswith("pooler")]
    assert frozen.weight_bytes(model) == 4 * sum(p.numel() for p in counted) < 4 * model.num_parameters()


def test_paired_differences():
    mean, margin = bench_precision.paired([0.5, 0.6, 0.7, 0.8, 0.9], [0.4, 0.6, 0.6, 0.8, 0.8])
    assert math.isclose(mean, 0.06)
    assert math.isclose(margin, 2.776 * math.sqrt(0.012 / 4 / 5), rel_tol=1e-9)


def test_figures_of_a_run(tmp_path, monkeypatch):
    calls = []

    def train(files, seed, out, *options):
        calls.append((seed, out.name, options))
        return {"accuracy": 0.5 + seed, "dev": {"accuracy": 0.25}, "epoch_seconds": [1.0, 2.0], "more": []}

    monkeypatch.setattr(bench_precision, "train_ladder", train)
    monkeypatch.setattr(bench_precision, "text_files", lambda task: {})
    assert bench_precision._trained("trec", "bf16", 0, tmp_path) == {"accuracy": 0.5, "dev": 0.25, "seconds": 3.0}
    assert calls == [(0, "trec-bf16-0", ("--reduction", "8", "--precision", "bf16"))]
