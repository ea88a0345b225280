"""From a model to a bundle, and the emulator that a data owner reads from it."""

import json

import pytest
import torch
import transformers as hf
from torch import nn

import tlfast
from tests.models import COMMON, CONFIGS, DECODERS, IMAGE_ENCODERS, TEXT_ENCODERS, TOKENS, inputs_of, tiny
from tlfast.data import InputError
from tlfast.offsite import Bundle, architecture, make
from tlfast.offsite.recipes import Recipe

FAMILIES = [*TEXT_ENCODERS, *IMAGE_ENCODERS, *DECODERS]


def deep(family, count=7):
    """A model with that many blocks."""
    name = CONFIGS[family].attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings = {name: count}
    if hasattr(CONFIGS[family], "layer_types"):
        settings["layer_types"] = [("full_attention", "sliding_attention")[i % 3 == 1] for i in range(count)]
        settings |= {"sliding_window": 4, "use_sliding_window": True} if family != "modernbert" else {}
    settings |= {"stage_names": ["stem"], "_out_features": None} if family == "dinov2" else {}
    return tiny(family, **settings)


def skipping(model, left_out, inputs):
    """The first output of a model whose blocks in left_out give what they are given."""

    def skip(_block, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = architecture.find_blocks(model).blocks
    handles = [blocks[i].register_forward_hook(skip, with_kwargs=True) for i in left_out]
    with torch.no_grad():
        output = model(**inputs)[0]
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "dinov2"])
def test_layer_drop_is_the_model_without_those_blocks(family, tmp_path):
    model, inputs = deep(family), inputs_of(family)
    bundle = make(model, (2, 1), "keep:2", tmp_path / "bundle")
    assert bundle.blocks.kept == (0, 1, 2, 5, 6)
    expected = skipping(model, {3, 4}, inputs)
    with torch.no_grad():
        assert torch.equal(bundle.model(**inputs)[0], expected)
        assert not torch.allclose(model(**inputs)[0], expected)


def test_types_of_layers_and_indices_go_with_their_blocks(tmp_path):
    model = deep("qwen2")
    bundle = make(model, (2, 1), "keep:2", tmp_path / "bundle")
    types = model.config.layer_types
    assert bundle.model.config.layer_types == [types[i] for i in (0, 1, 2, 5, 6)]
    assert [block.self_attn.layer_idx for block in bundle.model.model.layers] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("recipe", ["keep:all", "svd:8", "prune:0.5", "int8", "nf4"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5-encoder", "clip-vision"])
def test_only_the_middle_is_compressed(family, recipe, tmp_path):
    model = deep(family, 5)
    bundle = make(model, (1, 2), recipe, tmp_path / "bundle")
    path = architecture.blocks_path(model)
    sent, own = architecture.tensors_of(bundle.model), architecture.tensors_of(model)
    assert sent.keys() == own.keys()
    changed = {name for name in own if not torch.equal(sent[name], own[name])}
    middle = {f"{path}.{i}." for i in (1, 2)}
    assert all(name.startswith(tuple(middle)) for name in changed)
    assert bool(changed) == (recipe != "keep:all")
    if recipe not in ("keep:all", "prune:0.5"):
        matrices = {n for n in own if n.startswith(tuple(middle)) and own[n].dim() == 2 and "relative" not in n}
        assert matrices == changed == bundle.manifest["encodings"].keys()


def test_svd_is_the_best_of_its_rank(tmp_path):
    model = deep("bert", 3)
    bundle = make(model, (1, 1), "svd:8", tmp_path / "bundle")
    name = "encoder.layer.1.output.dense.weight"
    own, sent = model.state_dict()[name].double(), bundle.model.state_dict()[name].double()
    values = torch.linalg.svdvals(own)
    assert torch.linalg.matrix_rank(sent, atol=1e-4) == 8
    assert torch.allclose((own - sent).norm(), values[8:].norm(), rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5-encoder", "vit"])
def test_pruned_channels_are_the_smallest_and_give_nothing(family, tmp_path):
    model = deep(family, 3)
    bundle = make(model, (1, 1), "prune:0.25", tmp_path / "bundle")
    down = {"gpt2": "mlp.c_proj", "bert": "output.dense", "llama": "mlp.down_proj", "vit": "mlp.fc2"}
    down["t5-encoder"] = "layer.1.DenseReluDense.wo"
    block = architecture.find_blocks(bundle.model).blocks[1]
    weight = block.get_submodule(down[family]).weight
    columns = weight if family == "gpt2" else weight.T  # (channels, width)
    assert (columns == 0).all(dim=1).sum() == 24, "a quarter of 96"


def test_tied_weights_are_sent_once_and_untied_ones_both(tmp_path):
    for tied in (True, False):
        torch.manual_seed(0)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=48, n_layer=3, n_head=3, **TOKENS, tie_word_embeddings=tied))
        with torch.no_grad():
            model.transformer.wte.weight.normal_()
        bundle = make(model.eval(), (1, 1), "keep:all", tmp_path / str(tied))
        head, table = bundle.model.lm_head.weight, bundle.model.transformer.wte.weight
        assert (head is table) == tied
        assert torch.equal(head, model.lm_head.weight) and torch.equal(table, model.transformer.wte.weight)


def test_a_missing_pooler_is_no_obstacle(tmp_path):
    model = hf.BertModel(hf.BertConfig(**COMMON), add_pooling_layer=False).eval()
    bundle = make(model, (1, 1), "keep:all", tmp_path / "bundle")
    inputs = inputs_of("bert")
    assert torch.equal(bundle.model(**inputs)[0], model(**inputs)[0])


def test_a_head_without_a_padding_token_is_no_obstacle(tmp_path):
    config = hf.GPT2Config(n_embd=48, n_layer=3, n_head=3, vocab_size=97, num_labels=4)
    model = hf.GPT2ForSequenceClassification(config).eval()
    bundle = make(model, (1, 1), "keep:all", tmp_path / "bundle")
    assert torch.equal(bundle.model.score.weight, model.score.weight)


def test_the_manifest_names_neither_the_source_nor_the_weights(tmp_path):
    model = tiny("bert")
    model.config._name_or_path = "/home/owner/secret-model"
    make(model, (1, 1), "svd:8", tmp_path / "one")
    make(model, (1, 1), "svd:8", tmp_path / "two")
    one, two = ((tmp_path / name / "manifest.json").read_text() for name in ("one", "two"))
    assert "secret" not in one and "owner" not in one
    assert json.loads(one)["seal"] != json.loads(two)["seal"], "two bundles of one model are not to be told as such"
    assert tlfast.backbone.fingerprint(model, "offsite") not in one


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_tokenizer_reads_as_the_owners(name, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<s>", "[PAD]", "[UNK]", "a", "b", "c"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.enable_truncation(2)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", eos_token="<s>", padding_side="left", model_max_length=9
    )
    bundle = make(tiny(name), (1, 1), "keep:all", tmp_path / "bundle", preprocessor=tokenizer)
    read = bundle.preprocessor
    assert read(["a b z c", "b"], padding=True)["input_ids"] == [[3, 4, 2, 5], [1, 1, 1, 4]]
    assert (read.pad_token, read.eos_token, read.unk_token, read.model_max_length) == ("[PAD]", "<s>", None, 9)


def test_the_image_processor_reads_as_the_owners(tmp_path):
    pytest.importorskip("PIL")
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    bundle = make(tiny("vit"), (1, 1), "keep:all", tmp_path / "bundle", preprocessor=processor)
    image = torch.arange(20 * 24 * 3, dtype=torch.uint8).reshape(3, 20, 24)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(bundle.preprocessor(image, return_tensors="pt")["pixel_values"], expected)


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny("bert").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make(model, (1, 1), "int8", tmp_path / "bundle")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["keep:0", "keep", "keep:-1", "keep:1.5", "svd:0", "svd:", "prune:1", "prune:0"])
@pytest.mark.parametrize("more", ["", " "])
def test_recipes_that_are_none(recipe, more):
    for text in (recipe + more, "int8:2", "nf3", "", None, "prune:nan", "keep:²"):
        with pytest.raises(ValueError, match=r"emulator: .* is not available; pass \"keep:N\""):
            Recipe.of(text)


def test_refusals(tmp_path):
    out = tmp_path / "bundle"
    with pytest.raises(TypeError, match="pass a transformers model"):
        make("bert-base", out=out)
    with pytest.raises(ValueError, match="a Linear cannot be taken apart"):
        make(nn.Linear(2, 2), out=out)
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        make(tiny("t5"), (1, 1), out=out)
    with pytest.raises(ValueError, match="keep: 2 of the 1 middle blocks"):
        make(tiny("bert"), (1, 1), "keep:2", out)
    with pytest.raises(ValueError, match="rank 48 is that of a matrix of the middle as it is; pass 1 to 47"):
        make(tiny("bert"), (1, 1), "svd:48", out)
    with pytest.raises(TypeError, match=r"call model.float\(\)"):
        make(tiny("bert").half(), (1, 1), "keep:all", out)
    with pytest.raises(TypeError, match="preprocessor: got a str"):
        make(tiny("bert"), (1, 1), "keep:all", out, preprocessor="bert")
    broken = tiny("bert")
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        make(broken, (1, 1), "keep:all", out)
    changed = tiny("bert")
    changed.encoder.layer[1].extra = nn.Linear(2, 2)
    changed.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"it has adapter\.weight, unlike what transformers makes"):
        make(changed, (1, 1), "keep:all", out)
    model = deep("gpt2", 5)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        make(model, (1, 1), "keep:2", out)
    hooked = tiny("bert")
    hooked.encoder.layer[0].register_forward_hook(lambda _m, _a, out: out * 2)
    with pytest.raises(ValueError, match="it computes something else than the emulator"):
        make(hooked, (1, 1), "keep:all", out)
    assert not out.exists() and not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="is there already"):
        make(tiny("bert"), (1, 1), "keep:all", out)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "mine"]


def test_reading_gives_what_make_gave(tmp_path):
    made = make(tiny("opt"), (1, 1), "nf4", tmp_path / "bundle")
    read = Bundle.read(tmp_path / "bundle")
    assert read.sha256 == made.sha256 and read.blocks == made.blocks
    assert all(torch.equal(a, b) for a, b in zip(read.model.parameters(), made.model.parameters(), strict=True))
