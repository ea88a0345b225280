"""Models the table of families does not know: one list of blocks is found, named, or asked for."""

import pytest
import torch
import transformers
from torch import nn

import tlfast
from tests.models import COMMON, IMAGES, TEXT_ENCODERS, batch, tiny


class Block(nn.Module):
    """A block of no family; its norm tells its width, as its attention tells its heads."""

    def __init__(self, width=24, heads=4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Plain(nn.Module):
    """A model without a configuration that takes token ids."""

    def __init__(self, blocks=3, width=24, **lists):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, width)
        self.trunk = nn.ModuleList(Block(width) for _ in range(blocks))
        for name, modules in lists.items():
            setattr(self, name, modules)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.trunk:
            x = block(x)
        return x


def linears(count, width=24):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def test_the_longest_list_is_tapped():
    model, ids = Plain(others=linears(2)), batch((7, 7))["input_ids"]
    backbone = tlfast.freeze(model)
    output = backbone(input_ids=ids)
    x, expected = model.embed(ids), []
    with torch.no_grad():
        for block in model.trunk:
            x = block(x)
            expected.append(x)
    assert torch.equal(output.embedding, model.embed(ids))
    assert all(torch.equal(tap, own) for tap, own in zip(output.taps, expected, strict=True))
    assert torch.equal(output.last_hidden_state, x)
    spec = backbone.block_spec
    assert (spec.width, spec.heads, spec.head_dim, spec.hidden, spec.causal) == (24, 4, 6, 96, False)
    assert (backbone.model_type, backbone.lm_head, backbone.config) == ("Plain", None, None)
    assert "found by the generic rule" in repr(backbone) and "trunk[0, 1, 2]" in repr(backbone)


def test_a_named_list_is_tapped():
    model = Plain(others=linears(5))
    backbone = tlfast.freeze(model, blocks="trunk", taps=[-1])
    assert backbone.blocks is model.trunk and backbone.tap_indices == (2,)


def test_a_transformers_model_the_table_does_not_know():
    torch.manual_seed(0)
    model = transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**COMMON)).eval()
    backbone, inputs = tlfast.freeze(model), batch()
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True)
    ours, valid = backbone(**inputs), inputs["attention_mask"].bool()
    assert torch.equal(ours.taps[0][valid], theirs.hidden_states[1][valid])
    assert torch.equal(ours.last_hidden_state[valid], theirs.last_hidden_state[valid])
    assert (backbone.block_spec.width, backbone.block_spec.heads) == (48, 3)


def test_naming_the_list_overrules_the_table():
    model = tiny("llama").model
    assert tlfast.freeze(model, blocks="layers").stack.parts is None
    assert tlfast.freeze(model).stack.parts is not None


def vision_text(kind):
    return {
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=COMMON, vision_config=IMAGES, projection_dim=8)
        ),
        "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=COMMON, vision_config=IMAGES)),
    }[kind]()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_two_towers_one_is_to_be_chosen(kind):
    model = vision_text(kind)
    with pytest.raises(
        ValueError, match=rf"model: a {kind} model has two towers.*model\.vision_model or model\.text_m"
    ):
        tlfast.freeze(model)
    pixels = torch.randn(2, 3, 16, 16)
    assert len(tlfast.freeze(model.vision_model)(pixel_values=pixels).taps) == 3
    inputs = {"input_ids": batch((6, 6))["input_ids"]}
    with torch.no_grad():
        expected = model.text_model(**inputs).last_hidden_state
    assert torch.equal(tlfast.freeze(model.text_model)(**inputs).last_hidden_state, expected)


class Narrow(nn.Module):
    """A model whose blocks do not tell their width."""

    def __init__(self):
        super().__init__()
        self.layers = linears(2)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "words"),
    [
        (nn.Linear(2, 2), {}, ValueError, ["Linear", "no nn.ModuleList", "blocks=", "bert"]),
        (Plain(1), {}, ValueError, ["Plain", "no nn.ModuleList of at least two blocks", 'blocks="path.to.list"']),
        (Plain(others=linears(3)), {}, ValueError, ["2 lists of 3 blocks", "trunk, others", 'blocks="trunk"']),
        (Plain(), {"blocks": "trunks"}, ValueError, ["blocks", "'trunks'", "it has the lists trunk"]),
        (Plain(), {"blocks": "embed"}, ValueError, ["blocks", "'embed' is a Embedding", "nn.ModuleList"]),
        (Plain(others=nn.ModuleList()), {"blocks": "others"}, ValueError, ["blocks", "'others'", "at least one block"]),
        (nn.Linear(2, 2), {"blocks": "layers"}, ValueError, ["blocks", "it has the lists none"]),
        (Narrow(), {}, ValueError, ["width", "Narrow", "config with hidden_size"]),
        (Plain(), {"taps": [3]}, ValueError, ["taps", "3", "blocks 0 to 2"]),
        (Plain().double(), {}, TypeError, ["float64", "model.float()"]),
        ("bert-base-uncased", {}, TypeError, ["model", "str", "transformers model"]),
    ],
)
def test_misuse_is_a_clear_error(model, arguments, error, words):
    with pytest.raises(error) as caught:
        tlfast.freeze(model, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_known_family_is_listed_where_none_fits():
    with pytest.raises(ValueError) as caught:
        tlfast.freeze(nn.Linear(2, 2))
    assert {config.model_type for config in TEXT_ENCODERS.values()} <= set(
        str(caught.value).partition("inside: ")[2].rstrip(")").split(", ")
    )
