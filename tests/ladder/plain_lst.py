"""Ladder side-tuning on T5 in plain PyTorch, written from the paper's description: nothing of tlfast, nothing of
transformers. Weights go by the names of the authors' code, as the golden files have them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
MASKED = -1e4
ACTIVATIONS = {"relu": F.relu, "gelu": lambda x: F.gelu(x, approximate="tanh")}


class PlainLST:
    """A T5 and the ladder on it. config: the metadata of a golden file; weights: its `param.*`, without the prefix."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.eps = config["layer_norm_epsilon"]
        self.activation = ACTIVATIONS[config["feed_forward_proj"].removeprefix("gated-")]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Weights:
        """logits, loss, and every tap."""
        decoder_ids = F.pad(labels, (1, 0))[:, :-1]
        decoder_ids = decoder_ids.masked_fill(decoder_ids == -100, 0)
        padding = (1 - attention_mask.to(self.weights["shared.weight"].dtype))[:, None, None] * MASKED
        length = labels.shape[1]
        future = torch.full((length, length), MASKED).triu(1)[None, None].to(padding.dtype)

        embedded = self.weights["shared.weight"][input_ids]
        taps = self._backbone("encoder", embedded, padding)
        memory = self._norm("encoder.final_layer_norm.weight", taps[-1])
        side_memory = self._ladder("encoder", embedded, taps, padding)

        embedded = self.weights["shared.weight"][decoder_ids]
        decoder_taps = self._backbone("decoder", embedded, future, memory, padding)
        side = self._ladder("decoder", embedded, decoder_taps, future, side_memory, padding)
        hidden = self._linear("side_final_upsample", side)
        if self.config["tie_word_embeddings"]:
            hidden = hidden * self.config["d_model"] ** -0.5
        logits = hidden @ self.weights["lm_head.weight"].T
        result = {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)}
        for name, of_stack in (("encoder", taps), ("decoder", decoder_taps)):
            result |= {f"tap.{name}.{index}": tap for index, tap in enumerate(of_stack)}
        return result

    def _backbone(
        self, stack: str, x: torch.Tensor, mask: torch.Tensor, memory: Any = None, memory_mask: Any = None
    ) -> list[torch.Tensor]:
        """The output of every block."""
        taps: list[torch.Tensor] = []
        bias = self._position_bias(f"{stack}.block.0", stack, x.shape[1])
        for index in range(self.blocks(stack)):
            x = self._block(f"{stack}.block.{index}", x, mask + bias, memory, memory_mask)
            taps.append(x)
        return taps

    def _ladder(
        self,
        stack: str,
        embedded: torch.Tensor,
        taps: list[torch.Tensor],
        mask: torch.Tensor,
        memory: Any = None,
        memory_mask: Any = None,
    ) -> torch.Tensor:
        """The side network's normed output: s = mu s + (1 - mu) (W h + b), s = block(s), for each kept block."""
        kept = self.config[f"{stack}_side_layers"]
        bias = self._position_bias(f"{stack}.side_block.{kept[0]}", stack, embedded.shape[1])
        s = self._linear(f"{stack}.side_first_downsample", embedded)
        for index in kept:
            mu = torch.sigmoid(self.weights[f"{stack}.side_gate_params.{index}"] / self.config["gate_temperature"])
            s = mu * s + (1 - mu) * self._linear(f"{stack}.side_downsamples.{index}", taps[index])
            s = self._block(f"{stack}.side_block.{index}", s, mask + bias, memory, memory_mask)
        return self._norm(f"{stack}.final_side_layer_norm.weight", s)

    def _block(self, name: str, x: torch.Tensor, bias: torch.Tensor, memory: Any, memory_mask: Any) -> torch.Tensor:
        y = self._norm(f"{name}.layer.0.layer_norm.weight", x)
        x = x + self._attention(f"{name}.layer.0.SelfAttention", y, y, bias)
        last = 1
        if memory is not None:
            y = self._norm(f"{name}.layer.1.layer_norm.weight", x)
            x = x + self._attention(f"{name}.layer.1.EncDecAttention", y, memory, memory_mask)
            last = 2
        y = self._norm(f"{name}.layer.{last}.layer_norm.weight", x)
        dense = f"{name}.layer.{last}.DenseReluDense"
        if self.config["feed_forward_proj"].startswith("gated-"):
            y = self.activation(self._linear(f"{dense}.wi_0", y)) * self._linear(f"{dense}.wi_1", y)
        else:
            y = self.activation(self._linear(f"{dense}.wi", y))
        return x + self._linear(f"{dense}.wo", y)

    def _attention(self, name: str, x: torch.Tensor, source: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        heads = self.config["num_heads"]
        q, k, v = (
            self._linear(f"{name}.{part}", inputs).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, inputs in (("q", x), ("k", source), ("v", source))
        )
        attended = torch.softmax(q @ k.transpose(-1, -2) + bias, dim=-1) @ v  # T5 does not scale the scores
        return self._linear(f"{name}.o", attended.transpose(1, 2).flatten(-2))

    def _position_bias(self, block: str, stack: str, length: int) -> torch.Tensor:
        """(1, H, length, length), looked up one pair of positions at a time."""
        table = self.weights[f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"]
        rows = [[table[self._bucket(k - q, stack)] for k in range(length)] for q in range(length)]
        return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)[None]

    def _bucket(self, distance: int, stack: str) -> int:
        buckets, offset = self.config["relative_attention_num_buckets"], 0
        if stack == "decoder":
            distance = max(-distance, 0)
        else:
            buckets //= 2
            offset = buckets if distance > 0 else 0
            distance = abs(distance)
        exact = buckets // 2
        if distance < exact:
            return offset + distance
        share = math.log(distance / exact) / math.log(self.config["relative_attention_max_distance"] / exact)
        return offset + min(exact + int(share * (buckets - exact)), buckets - 1)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.weights[name] * x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def blocks(self, stack: str) -> int:
        """How many blocks this half of the backbone has."""
        return (
            self.config.get("num_decoder_layers") or self.config["num_layers"]
            if stack == "decoder"
            else self.config["num_layers"]
        )


def random_weights(config: dict[str, Any], seed: int) -> Weights:
    """Weights of every name, in float64, drawn so that no part of the ladder is without effect."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    width, narrow = config["d_model"], config["d_model"] // config["reduction"]
    weights = {"shared.weight": draw(config["vocab_size"], width, scale=1.0)}
    tied = config["tie_word_embeddings"]
    weights["lm_head.weight"] = weights["shared.weight"] if tied else draw(config["vocab_size"], width, scale=0.2)
    for stack in ("encoder", "decoder"):
        kept = config[f"{stack}_side_layers"]
        count = PlainLST(config, weights).blocks(stack)
        blocks = [(f"{stack}.block.{i}", width, 1, i == 0) for i in range(count)]
        blocks += [(f"{stack}.side_block.{i}", narrow, config["reduction"], i == kept[0]) for i in kept]
        for name, d, r, first in blocks:
            inner = config["num_heads"] * config["d_kv"] // r
            layers = ["0.SelfAttention"] + ["1.EncDecAttention"] * (stack == "decoder")
            for layer in layers:
                for part in "qkv":
                    weights[f"{name}.layer.{layer}.{part}.weight"] = draw(inner, d, scale=0.5 * d**-0.5)
                weights[f"{name}.layer.{layer}.o.weight"] = draw(d, inner, scale=0.5 * inner**-0.5)
            if first:
                shape = (config["relative_attention_num_buckets"], config["num_heads"])
                weights[f"{name}.layer.0.SelfAttention.relative_attention_bias.weight"] = draw(*shape, scale=0.5)
            dense = f"{name}.layer.{len(layers)}.DenseReluDense"
            for up in ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated-") else ("wi",):
                weights[f"{dense}.{up}.weight"] = draw(config["d_ff"] // r, d, scale=d**-0.5)
            weights[f"{dense}.wo.weight"] = draw(d, config["d_ff"] // r, scale=(config["d_ff"] // r) ** -0.5)
            for index in range(len(layers) + 1):
                weights[f"{name}.layer.{index}.layer_norm.weight"] = 1 + draw(d, scale=0.1)
        for index in range(count):  # of dropped blocks too, where they have no gradient
            weights[f"{stack}.side_gate_params.{index}"] = draw(1, scale=0.1)
        for name in (f"{stack}.side_first_downsample", *(f"{stack}.side_downsamples.{i}" for i in kept)):
            weights[f"{name}.weight"] = draw(narrow, width, scale=width**-0.5)
            weights[f"{name}.bias"] = draw(narrow, scale=0.1)
        weights[f"{stack}.final_layer_norm.weight"] = 1 + draw(width, scale=0.1)
        weights[f"{stack}.final_side_layer_norm.weight"] = 1 + draw(narrow, scale=0.1)
    weights["side_final_upsample.weight"] = draw(width, narrow, scale=narrow**-0.5)
    weights["side_final_upsample.bias"] = draw(width, scale=0.1)
    return weights


def golden_tensors(config: dict[str, Any], seed: int, rows: int, source: int, target: int) -> Weights:
    """What a golden file holds, from this implementation in float64, stored in float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.float().double() for name, tensor in random_weights(config, seed).items()}
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["shared.weight"]
    trained = {name: tensor.requires_grad_() for name, tensor in weights.items() if "side" in name}
    ids = torch.randint(1, config["vocab_size"], (rows, source), generator=generator)
    labels = torch.randint(1, config["vocab_size"], (rows, target), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, source // 2 :] = 0
    labels[0, target - 1 :] = -100
    result = PlainLST(config, weights).forward(ids, mask, labels)
    result["loss"].backward()
    tensors = {f"param.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"grad.{name}": tensor.grad for name, tensor in trained.items() if tensor.grad is not None}
    tensors |= result | {"loss": result["loss"].reshape(1)}
    stored = {name: tensor.detach().float().clone().contiguous() for name, tensor in tensors.items()}
    return stored | {"input_ids": ids, "attention_mask": mask, "labels": labels}
