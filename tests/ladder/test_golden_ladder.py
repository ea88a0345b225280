"""The ladder on T5 against golden values of the authors' own code, and against a plain implementation of our own."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

import tlfast
from tests.conftest import ROOT
from tests.ladder.plain_lst import PlainLST, golden_tensors
from tlfast import LadderConfig, LadderModel

FOLDER = Path(os.environ.get("TLFAST_GOLDEN", ROOT / "../shared/golden"))
FILES = sorted(FOLDER.glob("lst_t5_*.safetensors"))
LOGITS, GRADIENTS, LOSS = 1e-5, 1e-4, 1e-6  # relative to the largest golden value
each_file = pytest.mark.parametrize(
    "path",
    FILES or [pytest.param(None, marks=pytest.mark.skip(f"no lst_t5_*.safetensors in {FOLDER}: set TLFAST_GOLDEN"))],
    ids=lambda path: getattr(path, "stem", "none"),
)
STACKS = {"encoder": "side_encoder", "decoder": "side"}


class Golden:
    """One file: its tensors, and its configuration."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.inputs = {name: self.tensors[name] for name in ("input_ids", "attention_mask", "labels")}

    def named(self, prefix):
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def indices(self, pattern):
        """The numbers at (\\d+) in the names that have a gradient, in their order."""
        found = (re.match(pattern, name) for name in self.named("grad."))
        return sorted({int(match[1]) for match in found if match is not None})

    def blocks(self, stack):
        return 1 + max(int(name.split(".")[2]) for name in self.named("param.") if name.startswith(f"{stack}.block."))

    def backbone(self):
        config = self.config
        of_config = {"d_model", "d_ff", "d_kv", "num_heads", "vocab_size", "feed_forward_proj", "tie_word_embeddings"}
        of_config |= {"relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"}
        model = T5ForConditionalGeneration(
            T5Config(
                **{name: config[name] for name in of_config if name in config},
                num_layers=self.blocks("encoder"),
                num_decoder_layers=self.blocks("decoder"),
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )
        if not config["tie_word_embeddings"]:  # transformers 5 ties every new T5
            model.lm_head = torch.nn.Linear(config["d_model"], config["vocab_size"], bias=False)
        own = {name: tensor for name, tensor in self.named("param.").items() if "side" not in name}
        missing, unexpected = model.load_state_dict(own, strict=False)
        assert set(missing) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} and not unexpected
        return tlfast.freeze(model.eval())

    def ladder(self):
        """A ladder with the file's weights, and the names in the file that each of its parameters stands for."""
        config = self.config
        model = LadderModel(
            self.backbone(),
            "seq2seq-lm",
            config=LadderConfig(
                reduction=config["reduction"],
                layers=config["encoder_side_layers"],
                decoder_layers=config["decoder_side_layers"],
                gate_temperature=config["gate_temperature"],
                init="random",
                blend=False,
            ),
        ).train()
        names, weights = self.names(), self.named("param.")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert parameters.keys() == names.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.joined(weights, names[name], parameter))
        return model, names

    def joined(self, tensors, names, like):
        return torch.cat([tensors[name] for name in names]).reshape(like.shape)

    def names(self):
        """Our parameters, each with the file's tensors that it joins."""
        names = {f"head.up.{x}": [f"side_final_upsample.{x}"] for x in ("weight", "bias")}
        for stack, ours in STACKS.items():
            blocks = self.indices(rf"{stack}\.side_block\.(\d+)\.")
            rungs = self.indices(rf"{stack}\.side_downsamples\.(\d+)\.")
            gates = self.indices(rf"{stack}\.side_gate_params\.(\d+)$")
            for index, (block, rung, gate) in enumerate(zip(blocks, rungs, gates, strict=True)):
                names |= self._of_block(f"{ours}.blocks.{index}", f"{stack}.side_block.{block}.layer", stack)
                names |= {
                    f"{ours}.rungs.{index}.{x}": [f"{stack}.side_downsamples.{rung}.{x}"] for x in WEIGHT_AND_BIAS
                }
                names[f"{ours}.rungs.{index}.alpha"] = [f"{stack}.side_gate_params.{gate}"]
            first = f"{stack}.side_block.{blocks[0]}.layer.0.SelfAttention"
            names[f"{ours}.relative_bias.weight"] = [f"{first}.relative_attention_bias.weight"]
            names[f"{ours}.norm.weight"] = [f"{stack}.final_side_layer_norm.weight"]
            names |= {f"{ours}.embedding.{x}": [f"{stack}.side_first_downsample.{x}"] for x in WEIGHT_AND_BIAS}
        return names

    def _of_block(self, ours, theirs, stack):
        own, last = f"{theirs}.0.SelfAttention", 1 if stack == "encoder" else 2
        names = {
            f"{ours}.attention.qkv.weight": [f"{own}.{part}.weight" for part in "qkv"],
            f"{ours}.attention.output.weight": [f"{own}.o.weight"],
            f"{ours}.attention_norm.weight": [f"{theirs}.0.layer_norm.weight"],
            f"{ours}.feed_forward_norm.weight": [f"{theirs}.{last}.layer_norm.weight"],
            f"{ours}.feed_forward.down.weight": [f"{theirs}.{last}.DenseReluDense.wo.weight"],
        }
        dense = f"{theirs}.{last}.DenseReluDense"
        if f"param.{dense}.wi.weight" in self.tensors:
            names[f"{ours}.feed_forward.up.weight"] = [f"{dense}.wi.weight"]
        else:
            names[f"{ours}.feed_forward.gate.weight"] = [f"{dense}.wi_0.weight"]
            names[f"{ours}.feed_forward.up.weight"] = [f"{dense}.wi_1.weight"]
        if stack == "decoder":
            cross = f"{theirs}.1.EncDecAttention"
            names |= {
                f"{ours}.cross_attention.query.weight": [f"{cross}.q.weight"],
                f"{ours}.cross_attention.key_value.weight": [f"{cross}.k.weight", f"{cross}.v.weight"],
                f"{ours}.cross_attention.output.weight": [f"{cross}.o.weight"],
                f"{ours}.cross_attention_norm.weight": [f"{theirs}.1.layer_norm.weight"],
            }
        return names


WEIGHT_AND_BIAS = ("weight", "bias")


def assert_near(name, ours, golden, allowed):
    assert ours.shape == golden.shape, f"{name}: {ours.shape} against {golden.shape}"
    error = ((ours - golden).abs().max() / golden.abs().max()).item()
    assert error <= allowed, f"{name}: {error:.1e} of its largest value, allowed {allowed:.0e}"


def compare(golden):
    """Logits, loss and every gradient of the file against the ladder's."""
    model, names = golden.ladder()
    result = model(**golden.inputs)
    assert_near("logits", result.logits, golden.tensors["logits"], LOGITS)
    assert_near("loss", result.loss.reshape(1), golden.tensors["loss"].reshape(1), LOSS)
    result.loss.backward()
    gradients = golden.named("grad.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = golden.joined(gradients, names[name], parameter)
            assert_near(name, parameter.grad, expected, GRADIENTS)
    compared = {name for joined in names.values() for name in joined}
    assert compared == gradients.keys(), "every gradient of the file, and none twice"
    assert sum(map(len, names.values())) == len(gradients)
    without = {name for name in golden.named("param.") if "side" in name} - gradients.keys()
    for name in without:  # the authors' gates of dropped blocks, which ours does not have
        stack, kind, index = name.split(".")[:3]
        assert kind == "side_gate_params" and int(index) not in golden.config[f"{stack}_side_layers"]


def compare_taps(golden):
    """Every tap of the file against the frozen backbone's."""
    backbone, labels = golden.backbone(), golden.tensors["labels"]
    start = torch.nn.functional.pad(labels, (1, 0))[:, :-1].clamp(min=0)
    output = backbone(
        input_ids=golden.tensors["input_ids"],
        attention_mask=golden.tensors["attention_mask"],
        decoder_input_ids=start,
    )
    tokens = golden.tensors["attention_mask"].bool()
    found = {f"encoder.{i}": tap for i, tap in enumerate(output.encoder.taps)}
    found |= {f"decoder.{i}": tap for i, tap in enumerate(output.decoder.taps)}
    taps = golden.named("tap.")
    assert found.keys() == taps.keys()
    for name, tap in taps.items():
        valid = tokens if name.startswith("encoder") else slice(None)
        assert_near(name, found[name][valid], tap[valid], LOGITS)


@each_file
def test_golden_ladder(path):
    compare(Golden(path))


@each_file
def test_golden_ladder_taps(path):
    compare_taps(Golden(path))


@each_file
def test_golden_ladder_is_what_the_plain_implementation_gives(path):
    golden = Golden(path)
    weights = {name: tensor.double() for name, tensor in golden.named("param.").items()}
    trained = {name: tensor.requires_grad_() for name, tensor in weights.items() if "side" in name}
    result = PlainLST(golden.config, weights).forward(**golden.inputs)
    result["loss"].backward()
    assert_near("logits", result["logits"], golden.tensors["logits"].double(), LOGITS)
    gradients = golden.named("grad.")
    assert {name for name, tensor in trained.items() if tensor.grad is not None} == gradients.keys()
    for name, gradient in gradients.items():
        assert_near(name, trained[name].grad, gradient.double(), GRADIENTS)


BASE = {
    "d_model": 48,
    "d_ff": 96,
    "num_heads": 3,
    "d_kv": 8,
    "num_layers": 3,
    "vocab_size": 61,
    "reduction": 2,
    "encoder_side_layers": [0, 1, 2],
    "decoder_side_layers": [0, 1, 2],
    "gate_temperature": 0.1,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-6,
}
VARIANTS = {
    "all-blocks": {},
    "without-the-first": {"encoder_side_layers": [1, 2], "decoder_side_layers": [2]},
    "gated-untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "encoder_side_layers": [2]},
    "unlike-halves": {
        "num_layers": 5,
        "num_decoder_layers": 2,
        "encoder_side_layers": [1, 4],
        "decoder_side_layers": [0, 1],
        "reduction": 8,
        "gate_temperature": 0.4,
    },
    "few-buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "d_kv": 16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_ladder_of_other_shapes(variant, tmp_path):
    """Files as the authors' code would write them, from the plain implementation in float64."""
    config = BASE | VARIANTS[variant]
    tensors = golden_tensors(config, seed=len(variant), rows=3, source=19, target=9)
    path = tmp_path / f"lst_t5_{variant}.safetensors"
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    compare(Golden(path))
    compare_taps(Golden(path))
