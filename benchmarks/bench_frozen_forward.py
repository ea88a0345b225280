"""The frozen forward with every tap, at each precision, beside transformers: eager, and under torch.compile.

MiniLM on all SST-2 test sentences of $TLFAST_DATA/text (batch 32, sorted by length), and bert-base dimensions at
16 x 128 full-length tokens with random weights. Everything runs interleaved in one process; figures are medians of the
rounds. transformers has sdpa attention and gives all hidden states; the compiled one is inductor with freezing (dynamic
shapes where lengths vary), its compilation counted apart. The tap error is ||tap - exact|| / ||exact|| of the worst
layer over the tokens of the first 8 batches, against the model in float64. The share of the GEMM rate counts the linear
layers of the tokens that are there, against PyTorch's own products at the same shapes in the same run (nf4 computes in
bf16).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from benchmarks.frozen import (
    DTYPES,
    PEER,
    PRECISIONS,
    Batch,
    Case,
    TapErrors,
    case,
    freeze_or_reason,
    gemm_flops,
    gemm_rates,
    hidden_states,
    timed,
    weight_bytes,
)
from tlfast.bench.measure import medians, timed_rounds

_ERROR_BATCHES = 8
Taps = Callable[[Batch], list[torch.Tensor]]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["minilm", "bert-base"])
def test_frozen_forward(benchmark: Any, name: str, precision: str) -> None:
    found = measured(name)
    if precision in found["refused"]:
        pytest.skip(f"freeze refuses {precision}: {found['refused'][precision]}")
    ours, peer = found["ours"][precision], PEER[precision]
    seconds, errors = found["seconds"], found["errors"]
    mine = seconds[f"tlfast {precision}"]
    speed = {key: value / mine for key, value in seconds.items()}
    rate = found["gemm_rates"]["bf16" if precision == "nf4" else precision]
    share = found["gemm_flops"] / mine / rate
    batches = case(name).batches[:2]
    benchmark.pedantic(lambda: [ours["forward"](batch) for batch in batches], rounds=1)

    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["tap_errors"] = errors
    benchmark.extra_info["gemm_rates"] = found["gemm_rates"]
    benchmark.extra_info["compile_seconds"] = found["compile_seconds"]
    benchmark.extra_info["freeze_seconds"] = ours["freeze_seconds"]
    benchmark.extra_info["first_batch_seconds"] = ours["first_batch_seconds"]
    benchmark.extra_info["speed"] = speed
    benchmark.extra_info["share_of_gemm_rate"] = share
    benchmark.extra_info["weights_against_fp32"] = ours["weights"]
    benchmark.extra_info["row"] = {
        "what": f"Frozen forward with every tap, {precision}; {case(name).name}",
        "ours": f"{mine:.2f} s, {speed['eager fp32']:.1f} x eager fp32, {speed[f'compiled {peer}']:.2f} x compiled "
        f"{peer}; tap error {_percent(errors[f'tlfast {precision}'])}, weights {ours['weights']:.2f} of fp32, "
        f"{100 * share:.0f} % of the GEMM rate, frozen in {ours['freeze_seconds']:.1f} s",
        "peer": ", ".join(
            f"{key} {seconds[key]:.2f} s" for key in dict.fromkeys(("eager fp32", f"eager {peer}", f"compiled {peer}"))
        )
        + f" (+ {found['compile_seconds'][peer]:.0f} s to compile); tap error {_percent(errors[f'eager {peer}'])}",
        "how": "tlfast bench frozen_forward",
    }


@functools.cache
def measured(name: str) -> dict[str, Any]:
    """Every precision of ours and every peer, interleaved, once a process."""
    chosen = case(name)
    config = chosen.make().config
    sizes = (config.hidden_size, config.intermediate_size)
    rows = round(chosen.tokens / len(chosen.batches))
    found: dict[str, Any] = {
        "ours": {},
        "refused": {},
        "compile_seconds": {},
        "gemm_flops": gemm_flops(chosen.tokens, config.num_hidden_layers, *sizes),
        "gemm_rates": gemm_rates(rows, *sizes),
    }
    taps: dict[str, Taps] = {}
    for precision in PRECISIONS:
        _add_ours(chosen, precision, found, taps)
    # a cache of its own: compilation counts whole, whatever was compiled before
    with torch.no_grad(), inductor.patch(freezing=True), fresh_cache():
        for precision in DTYPES:
            _add_peers(chosen, precision, found, taps)
        found["errors"] = _errors(chosen, taps)
        functions = {key: functools.partial(_run, read, chosen.batches) for key, read in taps.items()}
        found["seconds"] = medians(timed_rounds(functions, chosen.rounds))
    return found


def _add_ours(chosen: Case, precision: str, found: dict[str, Any], taps: dict[str, Taps]) -> None:
    model = chosen.make()
    whole = weight_bytes(model)
    frozen, seconds = timed(lambda: freeze_or_reason(model, precision))
    if isinstance(frozen, str):
        found["refused"][precision] = frozen
        return

    def forward(batch: Batch) -> list[torch.Tensor]:
        return list(frozen(packed=True, **batch).taps)

    _, first = timed(lambda: forward(chosen.batches[0]))
    found["ours"][precision] = {
        "forward": forward,
        "freeze_seconds": seconds,
        "first_batch_seconds": first,
        "weights": frozen.weight_bytes() / whole,
    }
    taps[f"tlfast {precision}"] = forward


def _add_peers(chosen: Case, precision: str, found: dict[str, Any], taps: dict[str, Taps]) -> None:
    eager = chosen.make().to(DTYPES[precision])
    # none of its parameters is read after compilation: inductor keeps its own, reordered
    compiled = torch.compile(chosen.make().to(DTYPES[precision]), dynamic=chosen.lengths_vary or None)

    def of(model: Callable[..., Any]) -> Taps:
        return lambda batch: list(model(**batch, output_hidden_states=True).hidden_states[1:])

    taps[f"eager {precision}"], taps[f"compiled {precision}"] = of(eager), of(compiled)
    # shapes that compile anew, such as an incomplete last batch, belong to compilation too
    _, first = timed(lambda: _run(taps[f"compiled {precision}"], chosen.batches))
    _, again = timed(lambda: _run(taps[f"compiled {precision}"], chosen.batches))
    found["compile_seconds"][precision] = first - again


def _errors(chosen: Case, taps: dict[str, Taps]) -> dict[str, float]:
    exact = chosen.make().double()
    errors = {key: TapErrors() for key in taps}
    for batch in chosen.batches[:_ERROR_BATCHES]:
        truth, mask = hidden_states(exact, batch), batch["attention_mask"].bool()
        for key, read in taps.items():
            errors[key].add([tap if tap.dim() == 2 else tap[mask] for tap in read(batch)], truth)
    return {key: error.worst for key, error in errors.items()}


def _run(read: Taps, batches: list[Batch]) -> None:
    for batch in batches:
        read(batch)


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error > 1e-4 else f"{error:.1e}"
