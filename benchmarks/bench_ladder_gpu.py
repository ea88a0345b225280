"""A training step of a ladder for causal language modelling on a CUDA GPU, random weights.

Llama-3-8B dimensions, 4 x 2048 tokens, r=16: every tap storage, and a ladder on every second block, beside the frozen
forward with head and loss, and beside peft's LoRA in bfloat16 with checkpointing and the same chunked loss.
Llama-3-70B dimensions in nf4, 1 x 2048 tokens.
All of a test run interleaved in one process. Memory is the peak of a step beyond the weights, reset for each case.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tlfast
from tlfast import LadderConfig, LadderModel
from tlfast.bench.measure import medians, timed_rounds
from tlfast.ops import linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE, ROUNDS, REDUCTION, SEQUENCE = "cuda", 5, 16, 2048
WARM_UP = 4  # steps, after which side blocks run as graphs
STORAGES = ("keep", "int8", "project", "offload", "stream")
HALF = "keep, every second block"
TAP_DIM = 256
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": SEQUENCE,
    "rope_theta": 500000.0,
    "use_cache": False,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
Step = Callable[[], torch.Tensor]


def test_llama_8b(benchmark: Any) -> None:
    config, tokens = LlamaConfig(**LLAMA_8B), _tokens(4)
    backbone = _frozen(config, "bf16")
    ladders = {storage: _ladder(backbone, storage) for storage in STORAGES}
    ladders[HALF] = _ladder(backbone, "keep", list(range(1, config.num_hidden_layers, 2)))
    functions: dict[str, Step] = {f"ladder {name}": _step(model, tokens) for name, model in ladders.items()}
    functions["frozen forward"] = _frozen_forward(backbone, tokens)
    functions["LoRA"] = _lora_step(config, tokens)
    memory = {name: _peak(function) for name, function in functions.items()}
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["ladder keep"], rounds=1)
    over = {name: value / seconds["frozen forward"] for name, value in seconds.items()}
    benchmark.extra_info.update(seconds=seconds, over_the_frozen_forward=over, bytes_beyond_the_weights=memory)

    def figure(name: str) -> str:
        return f"{over[name]:.2f} x the forward, {memory[name] / 2**30:.2f} GiB"

    faster, leaner = (values["LoRA"] / values["ladder keep"] for values in (seconds, memory))
    benchmark.extra_info["row"] = {
        "what": f"Training step, Llama-3-8B dimensions, {config.num_hidden_layers} blocks, 4 x {SEQUENCE}, "
        f"r={REDUCTION}, bf16; times of the frozen forward with head and loss, memory beyond the weights",
        "ours": "; ".join(f"{name} {figure(f'ladder {name}')}" for name in ladders)
        + f"; the forward {1e3 * seconds['frozen forward']:.0f} ms",
        "peer": f"peft LoRA r=16, bf16, checkpointing, chunked loss: {figure('LoRA')}; "
        f"{faster:.2f} x the time of keep, {leaner:.1f} x its memory",
        "how": "tlfast bench ladder_gpu",
    }


def test_llama_70b_in_nf4(benchmark: Any) -> None:
    config, tokens = LlamaConfig(**LLAMA_70B), _tokens(1)
    backbone = _frozen(config, "nf4")
    model = _ladder(backbone, "keep")
    step = _step(model, tokens)
    weights = torch.cuda.memory_allocated()
    losses = [float(step())]
    memory = _peak(step)
    seconds = medians(timed_rounds({"step": step, "frozen forward": _frozen_forward(backbone, tokens)}, 3))
    losses.append(float(benchmark.pedantic(step, rounds=1)))
    assert losses[-1] < losses[0], losses
    benchmark.extra_info.update(seconds=seconds, bytes_beyond_the_weights=memory, bytes_held=weights, losses=losses)
    benchmark.extra_info["row"] = {
        "what": f"Training step, Llama-3-70B dimensions in nf4, {config.num_hidden_layers} blocks, 1 x {SEQUENCE}, "
        f"r={REDUCTION}, keep, one GPU",
        "ours": f"{SEQUENCE / seconds['step']:.0f} tokens a second, {seconds['step'] / seconds['frozen forward']:.2f} "
        f"x the frozen forward; {weights / 2**30:.1f} GiB held, {memory / 2**30:.2f} beyond it at the peak",
        "peer": "-",
        "how": "tlfast bench ladder_gpu",
    }


def _tokens(examples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 30000, (examples, SEQUENCE), generator=generator).to(DEVICE)


def _frozen(config: Any, precision: str) -> Any:
    """The frozen model. In float32 only one block is held: all have its weights, and each is stored by itself."""
    torch.manual_seed(0)
    one = copy.copy(config)
    one.num_hidden_layers = 1
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(one).eval()
    first = model.model.layers[0]
    for index in range(1, config.num_hidden_layers):
        block = copy.deepcopy(first, {id(weight): weight for weight in first.parameters()})
        block.self_attn.layer_idx = index
        model.model.layers.append(block)
    model.config.num_hidden_layers = config.num_hidden_layers
    backbone = tlfast.freeze(model, precision)
    backbone.model.lm_head.bfloat16()  # as the peer's, and as autocast would round it in every step
    assert {row["path"] for row in backbone.describe()} == {"packed"}
    del model, first, block
    _free()
    return backbone


def _ladder(backbone: Any, storage: str, layers: str | list[int] = "all") -> Any:
    config = LadderConfig(
        reduction=REDUCTION,
        layers=layers,
        init="random",
        tap_storage=storage,
        tap_dim=TAP_DIM,
        side_precision="bf16",
    )
    calibration = [{"input_ids": _tokens(1)[:, :512]}] if storage == "project" else None
    return LadderModel(backbone, "causal-lm", None, config, calibration).to(DEVICE).train()


def _step(model: Any, tokens: torch.Tensor) -> Step:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3, fused=DEVICE == "cuda")

    def run() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):  # as Trainer's bf16=True has it
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _frozen_forward(backbone: Any, tokens: torch.Tensor) -> Step:
    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]

    @torch.no_grad()
    def run() -> torch.Tensor:
        last = backbone(visit=lambda tap: None, input_ids=tokens).last_hidden_state
        return backbone.lm_head.loss(last.bfloat16(), labels, -100)

    return run


def _lora_step(config: Any, tokens: torch.Tensor) -> Step:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    peft: Any = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    optimizer = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), 1e-3, fused=DEVICE == "cuda")
    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]

    def run() -> torch.Tensor:
        hidden = peft.base_model.model.model(input_ids=tokens).last_hidden_state
        loss = linear_cross_entropy(hidden, model.lm_head.weight, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _peak(function: Step) -> int:
    """The peak of a call in bytes beyond what was held before the first one: the optimizer's state counts, and so does
    what CUDA graphs work in, which PyTorch counts as free between their replays."""
    held, in_graphs = torch.cuda.memory_allocated(), _free_in_graphs()
    for _ in range(WARM_UP):
        function()
    _free()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held + _free_in_graphs() - in_graphs


def _free_in_graphs() -> int:
    """Bytes of the private pools of CUDA graphs that no tensor holds."""
    segments = torch.cuda.memory_snapshot()
    pools = (segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))
    return sum(segment["total_size"] - segment["allocated_size"] for segment in pools)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
