"""How taps are kept: what must not change a gradient does not, and what may changes it by as much as it says."""

import pytest
import torch

import tlfast
from tests.models import DECODERS, ENCODER_DECODERS, batch, examples_of, task_of, tiny
from tlfast import LadderConfig, LadderModel

FAMILIES = ("bert", "modernbert", "vit", "gpt2", "gemma2", "t5", "t5-v1.1", "bart")
INPUTS = batch()


def ladder(storage, family="bert", dropout=0.0, precision="fp32", **settings):
    """One whose trained weights are all moved, so that a gradient reaches each of them."""
    torch.manual_seed(0)
    frozen = tlfast.freeze(tiny(family), precision)
    settings = {"reduction": 2, "init": "random", "tap_dim": 8} | settings
    config = LadderConfig(tap_storage=storage, dropout=dropout, **settings)
    model = LadderModel(frozen, task_of(family), 3, config).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gradients(model, *batches):
    model.zero_grad()
    torch.manual_seed(2)
    for inputs in batches:
        model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        # a scalar gate's is a sum over all tokens and channels that nearly cancels
        allowed = largest * (max(tolerance, 2e-4) if name.endswith("alpha") else tolerance)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=allowed, msg=name)


def of_taps(name):
    """Whether this weight reads a tap: the embedding's or a rung's projection."""
    return name.endswith("embedding.weight") or ("rungs" in name and name.endswith("weight"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_has_the_gradients_of_keep(family, dropout):
    inputs = examples_of(family)
    ours, theirs = (gradients(ladder(storage, family, dropout), inputs) for storage in ("stream", "keep"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_stream_accumulates_over_batches_as_keep_does(gate):
    batches = [examples_of("t5", seed) for seed in range(3)]
    ours, theirs = (gradients(ladder(storage, "t5", 0.2, gate=gate), *batches) for storage in ("stream", "keep"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_int8_moves_only_the_gradients_of_projections(family):
    inputs = examples_of(family)
    ours, theirs = (gradients(ladder(storage, family, 0.2), inputs) for storage in ("int8", "keep"))
    exact = {name for name in theirs if not of_taps(name)}
    assert_same({name: ours[name] for name in exact}, {name: theirs[name] for name in exact})
    errors = [float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs if of_taps(n)]
    assert 1e-4 < max(errors) < 2e-2, errors


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_project_is_a_rung_on_the_projected_tap(family):
    """Its gradients are autograd's own for the formula."""
    inputs = examples_of(family)
    model = ladder("project", family, 0.2)
    model.calibrate([inputs])
    ours = gradients(model, inputs)
    sides = [model.side] if model.side_encoder is None else [model.side_encoder, model.side]
    for rung in (rung for side in sides for rung in side.rungs):
        rung.forward = lambda h, s, rung=rung: _formula(rung, h, s)
    assert_same(ours, gradients(model, inputs))


def _formula(rung, h, s):
    mu = torch.sigmoid(rung.alpha / rung.temperature)
    return mu * s + (1 - mu) * ((h @ rung.basis.T) @ rung.weight.T + rung.bias)


def test_project_of_full_width_is_keep():
    """With as many directions as channels nothing is lost: the same outputs from the folded starting weights."""
    for init in ("prune", "pca"):
        models = [ladder(storage, init=init, tap_dim=48) for storage in ("keep", "project")]
        for model in models:
            model.calibrate([batch((30, 30), seed=3)])
            model.head.load_state_dict(models[0].head.state_dict())
        kept, projected = (model.eval()(**INPUTS).logits for model in models)
        torch.testing.assert_close(projected, kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["prune", "pca", "random"])
def test_bases_are_each_taps_own_principal_components(init):
    calibration = batch((30, 30, 30), seed=3)
    model = ladder("project", init=init, tap_dim=5)
    model.calibrate([calibration])
    output = model.backbone(**calibration)
    for module, tap in zip((model.side.embedding, *model.side.rungs), (output.embedding, *output.taps), strict=True):
        tokens = tap.flatten(0, 1).double()
        tokens -= tokens.mean(0)
        _, vectors = torch.linalg.eigh(tokens.T @ tokens)
        theirs = vectors[:, -5:]
        torch.testing.assert_close(module.basis @ module.basis.T, torch.eye(5), rtol=0, atol=1e-5)
        shares = [(tokens @ basis).square().sum() for basis in (module.basis.T.double(), theirs)]
        torch.testing.assert_close(shares[0], shares[1], rtol=1e-6, atol=0)


def test_the_mean_of_what_a_basis_leaves_out_is_in_the_bias():
    calibration = batch((30, 30, 30), seed=3)
    kept, projected = (ladder(storage, init="prune", tap_dim=4) for storage in ("keep", "project"))
    for model in (kept, projected):
        model.calibrate([calibration])
    for tap, whole, part in zip(kept.backbone(**calibration).taps, kept.side.rungs, projected.side.rungs, strict=True):
        ours = (part.project(tap) @ part.weight.T + part.bias).mean((0, 1))
        torch.testing.assert_close(ours, (tap @ whole.weight.T + whole.bias).mean((0, 1)), rtol=1e-4, atol=1e-4)


def test_of_few_tokens_a_basis_takes_the_rest_from_all_taps():
    """The own tokens of a tap lie in it whole, and the stream better than in directions of no meaning."""
    calibration, model = batch((6, 4), seed=3), ladder("project", init="random", tap_dim=24)
    with pytest.warns(UserWarning, match="calibration: 10 tokens do not determine 24 principal components"):
        model.calibrate([calibration])
    mask, output = calibration["attention_mask"].bool(), model.backbone(**calibration)
    tokens = torch.cat([tap[mask] for tap in output.taps])
    basis = model.side.rungs[0].basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(24), rtol=0, atol=1e-5)
    first = output.taps[0][mask] - output.taps[0][mask].mean(0)
    assert (first @ basis.T).norm() > 0.999 * first.norm()
    of_all = (tokens - tokens.mean(0)) @ basis.T
    arbitrary = torch.linalg.svd(first).Vh[:24]  # the first nine are the tap's own, the rest any
    assert of_all.norm() > ((tokens - tokens.mean(0)) @ arbitrary.T).norm()


@pytest.mark.parametrize("init", ["prune", "random"])
def test_project_calibrates_on_the_first_batch_and_comes_back_from_a_folder(init, tmp_path):
    model = ladder("project", init=init)
    assert not model.calibrated
    model(**examples_of("bert")).loss.backward()
    assert model.calibrated
    logits = model.eval()(**INPUTS).logits
    model.save_pretrained(tmp_path)
    again = LadderModel.from_pretrained(tmp_path, tiny())
    assert torch.equal(again(**INPUTS).logits, logits)
    assert torch.equal(again.side.rungs[1].basis, model.side.rungs[1].basis)


@pytest.mark.parametrize("storage", ["int8", "stream", "offload"])
def test_a_folder_of_another_storage_has_the_same_weights(storage, tmp_path):
    model = ladder(storage).eval()
    logits = model(**INPUTS | {"labels": None}).logits if storage != "offload" else None
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) == set(ladder("keep").state_dict())
    with torch.no_grad():
        again = LadderModel.from_pretrained(tmp_path, tiny())(**INPUTS).logits
    assert again.isfinite().all() and (logits is None or torch.equal(again, logits))


@pytest.mark.parametrize("storage", ["int8", "project", "offload", "stream"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_generation_is_untouched(storage, family):
    model = ladder(storage, family).eval()
    ids = batch((6, 6))["input_ids"]
    if storage == "project":
        model.calibrate([examples_of(family)])
    cached, whole = (model.generate(ids, max_new_tokens=4, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)


def errors_under_autocast(storage, exact):
    model = ladder(storage)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**examples_of("bert")).loss
    loss.backward()  # outside, as PyTorch wants it: a second forward has to find its way back
    return {name: (dict(model.named_parameters())[name].grad - gradient).norm() for name, gradient in exact.items()}


@pytest.mark.parametrize("storage", ["int8", "stream"])
def test_under_autocast_gradients_err_as_those_of_keep(storage):
    exact = gradients(ladder("keep"), examples_of("bert"))
    ours, theirs = (errors_under_autocast(kind, exact) for kind in (storage, "keep"))
    for name, gradient in exact.items():
        assert ours[name] <= 1.5 * theirs[name] + 1e-2 * gradient.norm(), name


def test_project_trains_under_autocast():
    model = ladder("project")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**examples_of("bert")).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_bf16_backbone_streams_within_its_rounding():
    inputs = examples_of("bert")
    exact = gradients(ladder("keep"), inputs)
    errors = {}
    for storage in ("stream", "keep"):
        found = gradients(ladder(storage, precision="bf16"), inputs)
        errors[storage] = {name: float((found[name] - gradient).norm()) for name, gradient in exact.items()}
    for name, error in errors["stream"].items():
        assert error <= 1.5 * errors["keep"][name] + 1e-3 * float(exact[name].norm()), name


def test_stream_runs_the_backbone_twice_and_only_where_a_gradient_is_taken():
    model = ladder("stream")
    calls = []
    model.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        model(**INPUTS)
    assert calls == [False]
    model(**examples_of("bert")).loss.backward()
    assert calls == [False, False, False]


def test_stream_can_go_back_twice():
    model = ladder("stream")
    loss = model(**examples_of("bert")).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, 2 * gradient)


def test_stream_sees_inputs_that_were_written_to():
    model, inputs = ladder("stream"), examples_of("bert")
    loss = model(**inputs).loss
    inputs["input_ids"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stream_leaves_frozen_projections_alone():
    model = ladder("stream")
    for rung in model.side.rungs:
        rung.weight.requires_grad_(False)
    model(**examples_of("bert")).loss.backward()
    assert all(rung.weight.grad is None and rung.bias.grad is not None for rung in model.side.rungs)


@pytest.mark.parametrize("storage", ["keep", "int8", "project", "stream"])
def test_an_empty_batch_and_a_masked_row(storage):
    model = ladder(storage)
    model.calibrate([batch((9, 9))])
    inputs = examples_of("bert")
    inputs["attention_mask"][0] = 0
    model(**inputs).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    ids = torch.zeros(0, 4, dtype=torch.long)
    model(input_ids=ids, attention_mask=ids).logits.sum().backward()


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_stream_refuses_what_it_cannot_run_again(family):
    with pytest.raises(ValueError, match="past_key_values: tap_storage 'stream' runs the backbone once more"):
        ladder("stream", family).eval()(**examples_of(family), use_cache=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ladder("project", tap_dim=49), ["tap_dim", "49", "48", "at most 48"]),
        (lambda: ladder("offload")(**INPUTS), ["tap_storage", "offload", "cpu", "int8", "stream", "GPU"]),
    ],
)
def test_misuse_is_a_clear_error(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
