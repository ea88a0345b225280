"""Bytes kept for the backward pass: bert-base dimensions, random weights, 16 x 128 tokens, dropout 0.1, float32."""

from __future__ import annotations

from benchmarks.peers import BATCH, PlainLadder, bert_base, full, ladder, lora, text_batch
from tlfast.bench.measure import hook_bytes, saved_bytes

MIB = 2**20


def _per_sample(measure, model, batch) -> float:
    """MiB a sample kept by one training forward, after a warm-up step."""

    def forward():
        return model(**batch)

    result = forward()
    (result if hasattr(result, "backward") else result.loss).backward()
    model.zero_grad(set_to_none=True)
    return measure(forward) / BATCH / MIB


def test_saved_for_backward(benchmark):
    batch, ours = text_batch(), ladder(bert_base())
    models = {
        "ladder": ours,
        "plain PyTorch ladder": PlainLadder(bert_base()).train(),
        "peft LoRA": lora(),
        "full fine-tuning": full(),
    }
    saved = {name: _per_sample(saved_bytes, model, batch) for name, model in models.items()}
    hooks = {name: _per_sample(hook_bytes, model, batch) for name, model in models.items()}
    benchmark.pedantic(lambda: ours(**batch), rounds=3)
    benchmark.extra_info["saved_mib_per_sample"] = saved
    benchmark.extra_info["hook_mib_per_sample"] = hooks
    benchmark.extra_info["row"] = {
        "what": "Saved for backward a sample, bert-base, 128 tokens, r=8, dropout 0.1, fp32",
        "ours": f"{saved['ladder']:.1f} MiB",
        "peer": f"LoRA r=8 {saved['peft LoRA']:.0f}, full {saved['full fine-tuning']:.0f}, "
        f"plain PyTorch ladder {saved['plain PyTorch ladder']:.1f} MiB",
        "how": "tlfast bench ladder_memory",
    }
