"""The whole frozen forward with every tap on a CUDA GPU, beside transformers (sdpa, bfloat16), random weights.

Llama-3-8B dimensions with 8 x 2048 tokens (every second block where the GPU has less than 100 GB), and bert-base
dimensions with 256 sentences of mixed length, which the peer takes sorted by length in its best batch size. What ours
gives is first held against the same model in float32: in bfloat16 it may err as the peer does, by half as much again;
in 8 bits its products are held against float64 in bench_frozen_kernels.py, and its error is reported.
The share of the GEMM rate counts linear layers and attention, against F.linear in bfloat16 at the model's own shapes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import tlfast
from tlfast.bench.measure import medians, timed_rounds
from tlfast.ops.frozen_linear import automatic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE, ROUNDS = "cuda", 7
BATCH, SEQUENCE, CHECKED = 8, 2048, 128
LLAMA = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=SEQUENCE,
    rope_theta=500000.0,
    use_cache=False,
)
BERT = BertConfig()
SENTENCES, LONGEST, BATCHES = 256, 128, (32, 64, 128, 256)
Batch = dict[str, torch.Tensor]


def test_llama(benchmark: Any) -> None:
    if torch.cuda.mem_get_info()[1] < 100e9:
        LLAMA.num_hidden_layers = 16
    model, peer = _models(LlamaModel, LLAMA)
    batch = _batch([SEQUENCE] * BATCH)
    ours = _frozen(model, ("bf16", "fp8", "int8"))
    errors = _errors(model, peer, ours, _batch([CHECKED]))
    del model
    _free()

    functions = {f"tlfast {precision}": lambda f=frozen: f(packed=True, **batch) for precision, frozen in ours.items()}
    functions["transformers bf16"] = _reads(peer, [batch])
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["tlfast bf16"], rounds=1)
    rate = _gemm_rate(LLAMA, BATCH * SEQUENCE)
    share = _llama_flops() / seconds["tlfast bf16"] / rate
    what = f"Frozen forward, Llama-3-8B dimensions, {LLAMA.num_hidden_layers} blocks, {BATCH} x {SEQUENCE}, every tap"
    _record(benchmark, what, seconds, errors)
    benchmark.extra_info.update(gemm_flops_per_second=rate, share_of_gemm_rate=share)
    benchmark.extra_info["row"]["ours"] += f"; bf16 at {100 * share:.0f} % of the GEMM rate, {rate / 1e12:.0f} TFLOP/s"


def test_bert_mixed_lengths(benchmark: Any) -> None:
    model, peer = _models(BertModel, BERT)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, LONGEST + 1, (SENTENCES,), generator=generator).sort(descending=True).values.tolist()
    ours, batch = _frozen(model, ("bf16",)), _batch(lengths)
    errors = _errors(model, peer, ours, _batch(lengths[:: SENTENCES // 8]))
    functions = {"tlfast bf16": lambda: ours["bf16"](packed=True, **batch)}
    for size in BATCHES:
        parts = [_batch(lengths[start : start + size]) for start in range(0, SENTENCES, size)]
        functions[f"batches of {size}"] = _reads(peer, parts)
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["tlfast bf16"], rounds=1)
    best = min((f"batches of {size}" for size in BATCHES), key=seconds.__getitem__)
    benchmark.extra_info["seconds_by_batch"] = seconds
    chosen = {"tlfast bf16": seconds["tlfast bf16"], "transformers bf16": seconds[best]}
    what = f"Frozen forward, bert-base dimensions, {SENTENCES} sentences of 4 to {LONGEST} tokens, every tap"
    _record(benchmark, what, chosen, errors)
    benchmark.extra_info["row"]["peer"] += f" ({best})"


def _models(kind: type, config: Any) -> tuple[Any, Any]:
    """The model in float32, and transformers' with the same weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = kind(config).eval()
        torch.set_default_dtype(torch.bfloat16)  # not a cast, which would also round the rotary frequencies
        try:
            peer = kind(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    peer.load_state_dict(model.state_dict())
    return model, peer


def _frozen(model: Any, precisions: tuple[str, ...]) -> dict[str, Any]:
    """The frozen model by precision, without those that are refused here; skips where the first one is."""
    found: dict[str, Any] = {}
    for precision in precisions:
        try:
            found[precision] = tlfast.freeze(model, precision=precision)
        except (ValueError, RuntimeError) as error:
            if precision == precisions[0]:
                pytest.skip(f"freeze refuses {precision}: {error}")
            print(f"freeze refuses {precision}: {error}")
            continue
        # what is measured here is the kernels' path: any other is a mistake of this machine's set-up
        assert {row["path"] for row in found[precision].describe()} == {"packed"}
        assert automatic(precision)[0] == "triton", automatic(precision)
    return found


def _batch(lengths: list[int]) -> Batch:
    """Random tokens of these lengths, padded."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(5, 30000, mask.shape, generator=generator) * mask
    return {"input_ids": tokens.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def _reads(peer: Any, batches: list[Batch]) -> Callable[[], list[Any]]:
    """transformers' forward, with the hidden states of every block."""

    @torch.no_grad()
    def run() -> list[Any]:
        return [peer(**batch, output_hidden_states=True).hidden_states for batch in batches]

    return run


@torch.no_grad()
def _block_outputs(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Every block's own output, without padding: the last hidden state of transformers' Llama has the final norm."""
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    blocks = model.layers if hasattr(model, "layers") else model.encoder.layer
    hooks = [block.register_forward_hook(keep) for block in blocks]
    model(**batch)
    for hook in hooks:
        hook.remove()
    mask = batch["attention_mask"].bool()
    return [output[mask] for output in outputs]


def _errors(model: Any, peer: Any, ours: dict[str, Any], batch: Batch) -> dict[str, float]:
    """||tap - exact|| / ||exact|| of the worst block, exact in float32; ours in bfloat16 within the peer's."""
    exact = _block_outputs(model, batch)
    taps = {"transformers bf16": _block_outputs(peer, batch)}
    taps |= {f"tlfast {name}": frozen(packed=True, **batch).taps for name, frozen in ours.items()}
    errors = {
        name: max(float((tap.float() - truth).norm() / truth.norm()) for tap, truth in zip(found, exact, strict=True))
        for name, found in taps.items()
    }
    assert errors["tlfast bf16"] <= 1.5 * errors["transformers bf16"], errors
    assert all(error < 1 for error in errors.values()), errors
    return errors


def _gemm_rate(config: LlamaConfig, rows: int) -> float:
    """Operations a second of F.linear in bfloat16 at a block's shapes, one after the other."""
    pairs = [
        (torch.randn(rows, i, device=DEVICE).bfloat16(), torch.randn(o, i, device=DEVICE).bfloat16())
        for i, o in _shapes(config)
    ]
    seconds = medians(timed_rounds({"linear": lambda: [F.linear(x, w) for x, w in pairs]}, 10))["linear"]
    return 2 * rows * sum(i * o for i, o in _shapes(config)) / seconds


def _shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's products: query, key and value in one, output, gate and up in one, down."""
    width, hidden = config.hidden_size, config.intermediate_size
    keys = width * config.num_key_value_heads // config.num_attention_heads
    return [(width, width + 2 * keys), (width, width), (width, 2 * hidden), (hidden, width)]


def _llama_flops() -> float:
    """Of all linear layers, and of causal attention: half of its two products."""
    linear = 2 * BATCH * SEQUENCE * sum(i * o for i, o in _shapes(LLAMA))
    return LLAMA.num_hidden_layers * (linear + 2 * BATCH * SEQUENCE * SEQUENCE * LLAMA.hidden_size)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _record(benchmark: Any, what: str, seconds: dict[str, float], errors: dict[str, float]) -> None:
    peer = seconds["transformers bf16"]
    benchmark.extra_info.update(seconds=seconds, tap_errors=errors)
    figures = {
        name: f"{1e3 * value:.1f} ms, {peer / value:.2f} x transformers, tap error {100 * errors[name]:.2g} %"
        for name, value in seconds.items()
    }
    del figures["transformers bf16"]
    benchmark.extra_info["row"] = {
        "what": what,
        "ours": "; ".join(f"{name.removeprefix('tlfast ')} {figure}" for name, figure in figures.items()),
        "peer": f"transformers bf16, sdpa, {1e3 * peer:.1f} ms, tap error {100 * errors['transformers bf16']:.2g} %",
        "how": "tlfast bench frozen_gpu",
    }
