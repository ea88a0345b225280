"""LadderModel: the formula, what trains, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import tlfast
from tests.models import BERT_LIKE, batch, digest, tiny
from tlfast import LadderConfig, LadderModel
from tlfast.ladder.heads import pool


def ladder(family="bert", num_labels=3, taps="all", problem_type=None, **settings):
    torch.manual_seed(0)
    config = LadderConfig(**{"reduction": 2, "init": "random", **settings})
    backbone = tlfast.freeze(tiny(family), taps=taps)
    return LadderModel(backbone, num_labels=num_labels, config=config, problem_type=problem_type)


def plain_logits(model, inputs):
    """The ladder in plain PyTorch, from the paper's equations and the model's own weights, in float64."""
    model = model.double()
    output = model.backbone(**inputs)
    mask = inputs["attention_mask"].bool()
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)[:, None, None]
    s = F.linear(output.embedding, model.side.embedding.weight, model.side.embedding.bias)
    for tap, rung, block in zip(output.taps, model.side.rungs, model.side.blocks, strict=True):
        mu = torch.sigmoid(rung.alpha / 0.1)
        x = mu * s + (1 - mu) * (tap @ rung.weight.T + rung.bias)
        heads, mlp = block.spec.heads, block.feed_forward
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in block.attention.qkv(x).chunk(3, dim=-1))
        attended = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias, dim=-1) @ v
        x = block.attention_norm(x + block.attention.output(attended.transpose(1, 2).flatten(-2)))
        s = block.feed_forward_norm(x + mlp.down(F.gelu(mlp.up(x))))
    s, weights = model.side.norm(s), mask.double() / mask.sum(1, keepdim=True)
    head = model.head
    side, own = head.up((weights[..., None] * s).sum(1)), (weights[..., None] * output.last_hidden_state).sum(1)
    mu = torch.sigmoid(head.alpha / 0.1)
    return head.classifier(mu * own + (1 - mu) * side)


@pytest.mark.parametrize("family", BERT_LIKE)
@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_logits_equal_the_papers_equations(family, gate):
    model, inputs = ladder(family, gate=gate).eval(), batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ours = model(**inputs).logits
        torch.testing.assert_close(ours.double(), plain_logits(model, inputs), rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_papers_equations():
    model, inputs = ladder(dropout=0.0), batch(labels=3)
    labels = inputs.pop("labels")
    model.train()(**inputs, labels=labels).loss.backward()
    ours = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    F.cross_entropy(plain_logits(model, inputs), labels).backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(gradient.abs().max().item(), 1e-4)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=2e-5 * scale + 1e-9, msg=name)


def test_only_the_side_network_trains_and_every_part_of_it_does():
    model = ladder()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("backbone") for name in trained)
    model.train()(**batch(labels=3)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert model.trainable_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("init", ["prune", "pca", "random"])
def test_training_lowers_the_loss_and_never_changes_the_backbone(init):
    model = ladder(init=init, dropout=0.0).train()
    before, inputs = digest(model.backbone.model), batch((9, 5, 12, 3, 7, 8), labels=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert digest(model.backbone.model) == before


def test_no_gradient_flows_into_the_backbone_graph():
    model = ladder().train()
    output = model.backbone(**batch())
    assert not any(t.requires_grad for t in (output.embedding, *output.taps))


def test_dropout_depends_on_the_seed_and_only_in_training():
    model, inputs = ladder(dropout=0.3), batch()

    def logits(seed):
        torch.manual_seed(seed)
        return model(**inputs).logits

    model.train()
    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


def test_padding_does_not_change_the_logits():
    model = ladder().eval()
    short = batch((5,))
    longer = {
        "input_ids": F.pad(short["input_ids"], (0, 6), value=1),
        "attention_mask": F.pad(short["attention_mask"], (0, 6)),
    }
    torch.testing.assert_close(model(**short).logits, model(**longer).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layers", "kept"), [([-1], (2,)), ([0, 2], (0, 2)), ("all", (0, 1, 2))])
def test_layers_choose_the_kept_blocks(layers, kept):
    model = ladder(layers=layers)
    assert model.backbone.tap_indices == kept
    assert len(model.side.blocks) == len(model.side.rungs) == len(kept)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("blend", [True, False])
def test_pooling_and_blend(pooling, blend):
    model, inputs = ladder(pooling=pooling, blend=blend), batch(labels=3)
    assert ("head.alpha" in dict(model.named_parameters())) == blend
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_regression_and_multi_label_losses():
    inputs = batch()
    targets = torch.tensor([0.5, -1.0, 2.0])
    result = ladder(num_labels=1).eval()(**inputs, labels=targets)
    torch.testing.assert_close(result.loss, F.mse_loss(result.logits[:, 0], targets))
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])
    result = ladder().eval()(**inputs, labels=several)
    torch.testing.assert_close(result.loss, F.binary_cross_entropy_with_logits(result.logits, several))


def test_one_token_a_masked_row_and_an_empty_batch():
    model = ladder().eval()
    assert model(input_ids=torch.tensor([[5]])).logits.isfinite().all()
    inputs = batch((6, 2))
    inputs["attention_mask"][0] = 0
    assert model(**inputs).logits.isfinite().all()
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert model(input_ids=empty, attention_mask=empty).logits.shape == (0, 3)


def test_repeated_calls_draw_new_dropout():
    model, inputs = ladder(dropout=0.5).train(), batch()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LadderModel(tiny()), TypeError, ["backbone", "BertModel", "tlfast.freeze"]),
        (lambda: LadderModel(tlfast.freeze(tiny()).with_taps(())), ValueError, ["backbone", "no taps"]),
        (lambda: LadderModel(tlfast.freeze(tiny()), task="poetry"), ValueError, ["task", "poetry", "sequence-class"]),
        (lambda: LadderModel(tlfast.freeze(tiny()), num_labels=0), ValueError, ["num_labels", "0"]),
        (lambda: ladder(reduction=5), ValueError, ["reduction", "5", "48", "3 heads", "allowed: 1, 2, 4"]),
        (lambda: ladder(reduction=32), ValueError, ["reduction", "32"]),
        (lambda: ladder(layers=[7]), ValueError, ["layers", "7", "blocks 0 to 2"]),
        (lambda: ladder(taps=[1], layers=[0, 1]), ValueError, ["layers", "[0]", 'taps="all"']),
        (lambda: ladder(problem_type="guess"), ValueError, ["problem_type", "guess", "regression"]),
        (lambda: LadderConfig(init="magic"), ValueError, ["init", "magic", "prune"]),
        (lambda: LadderConfig(reduction=0), ValueError, ["reduction", "0"]),
        (lambda: LadderConfig(reduction=2.5), ValueError, ["reduction", "2.5"]),
        (lambda: LadderConfig(gate_temperature=0), ValueError, ["gate_temperature"]),
        (lambda: LadderConfig(tap_storage="float3"), ValueError, ["tap_storage", "float3", "keep"]),
        (lambda: LadderConfig(dropout=1.0), ValueError, ["dropout", "1.0"]),
        (lambda: LadderConfig(tap_dim=0), ValueError, ["tap_dim", "0"]),
        (lambda: LadderConfig(tap_dim=1.5), ValueError, ["tap_dim", "1.5"]),
        (lambda: LadderConfig(layers="last"), ValueError, ["layers", "last", "all"]),
        (lambda: LadderConfig(layers=[1.7]), ValueError, ["layers", "1.7"]),
        (lambda: LadderConfig(layers=2), ValueError, ["layers", "2"]),
        (lambda: LadderConfig(gate_temperature=float("inf")), ValueError, ["gate_temperature", "inf"]),
        (lambda: LadderConfig(pooling="max"), ValueError, ["pooling", "max", "mean"]),
        (lambda: ladder(num_labels=1)(**batch(), labels=torch.zeros(3, 2)), ValueError, ["labels", "(3, 2)"]),
    ],
)
def test_misuse_is_a_clear_error(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("pooling", "chosen"), [("cls", 2), ("last", 6)])
def test_pooling_reads_a_tokens_position_under_left_padding(pooling, chosen):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    x = torch.randn(2, 7, 3)
    assert torch.equal(pool(x, mask, pooling), torch.stack((x[0, chosen], torch.zeros(3))))


def test_a_step_of_several_batches_counts_labels_as_trainer_does():
    model, inputs = ladder().eval(), batch()
    labels = torch.tensor([1, -100, 2])
    mean = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=2).loss, mean)
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=4).loss, mean / 2)


def test_the_callers_embeddings_are_not_written():
    model = tiny("llama")
    embeddings = model.get_input_embeddings()(batch()["input_ids"]).detach()
    before = embeddings.clone()
    tlfast.freeze(model)(inputs_embeds=embeddings, attention_mask=batch()["attention_mask"])
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize(("name", "value"), [("output_hidden_states", True), ("return_dict", False), ("wings", 2)])
def test_what_a_ladder_does_not_give_is_refused(name, value):
    with pytest.raises(TypeError, match=name):
        ladder()(**batch(), **{name: value})
