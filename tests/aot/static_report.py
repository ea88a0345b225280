"""What each kernel of the frozen forward takes on an H200, and the least time of its work; prints one JSON object.

Nothing is measured: registers and shared memory come from the compiler, occupancy from the limits of a multiprocessor
of compute capability 9.0, floors from bytes and operations at rates that were measured on an H200. Run by
test_static_report.py, which writes benchmarks/results/static.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tests.aot.compiling import LAUNCH_OPTIONS, POINTER, compile_kernel, resources
from tlfast.ops._quantised import LARGEST
from tlfast.ops.frozen_linear import triton_activate, triton_quantised, triton_tiles, triton_unpacked
from tlfast.ops.norm_tap import triton as norm_tap
from tlfast.ops.packed_attention import triton_rotate
from tlfast.ops.quantise_rows import triton as quantise_rows

CAPABILITY = 90
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = {"bf16": 788e12, "int8": 1576e12, "fp8": 1576e12, "none": float("inf")}
MULTIPROCESSORS = 132
# of a multiprocessor of compute capability 9.0: CUDA programming guide, technical specifications
REGISTERS, SHARED, WARPS, BLOCKS, RESERVED = 65536, 228 * 1024, 64, 32, 1024
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Model:
    """Sizes of a forward pass: tokens of the batch, and (inputs, outputs) of a block's linear layers by name."""

    name: str
    tokens: int
    width: int
    layers: dict[str, tuple[int, int]]
    activation: str
    rms: bool
    gated: bool


@dataclass(frozen=True)
class Launch:
    """One kernel at one shape: what it is compiled with, how many programs run, and the least work there is."""

    kernel: Any
    shape: str
    pointers: dict[str, str]
    config: dict[str, Any]
    programs: int
    moved_bytes: int
    flops: int
    rate: str
    floats: tuple[str, ...] = ()


def transformer(name: str, tokens: int, width: int, qkv: int, hidden: int, activation: str, **more: Any) -> Model:
    """A model by its widths; `gated` ones take gate and up projection in one product, and gate in its epilogue."""
    gated, rms = more.get("gated", False), more.get("rms", False)
    layers = {"qkv": (width, qkv), "out": (width, width), "up": (width, (1 + gated) * hidden), "down": (hidden, width)}
    return Model(name, tokens, width, layers, activation, rms, gated)


MODELS = (
    transformer("MiniLM 32 x 25", 800, 384, 1152, 1536, "gelu"),
    transformer("bert-base 16 x 128", 2048, 768, 2304, 3072, "gelu"),
    transformer("T5-large 8 x 128", 1024, 1024, 3072, 4096, "relu", rms=True),
    transformer("Llama-3-8B 8 x 2048", 16384, 4096, 6144, 14336, "silu", rms=True, gated=True),
)


def linears(model: Model) -> Iterator[tuple[str, int, int, int, str]]:
    """name, rows, inputs, outputs, activation of a block's linear layers."""
    for name, (inputs, outputs) in model.layers.items():
        yield name, model.tokens, inputs, outputs, model.activation if name == "up" else "none"


def quantised_linears(dtype: torch.dtype, rate: str, kernel: Any, model: Model) -> Iterator[Launch]:
    pointers = {"values_ptr": POINTER[dtype], "weight_ptr": POINTER[dtype], "y_ptr": "*bf16"}
    pointers |= dict.fromkeys(("row_scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32")
    for name, rows, inputs, outputs, activation in linears(model):
        gated = model.gated and name == "up"
        configs = triton_quantised.quantised_configs(CAPABILITY, activation, 2, gated)
        config = triton_tiles.choose(configs, rows, outputs)
        yield Launch(
            kernel,
            f"{name} {rows} x {inputs} to {outputs}",
            pointers,
            {**config, "HAS_BIAS": not model.rms, "ACTIVATION": activation, "GATED": gated},
            triton_tiles.programs(config, rows, outputs),
            rows * inputs + outputs * inputs + (2 - gated) * rows * outputs + 4 * (rows + 2 * outputs),
            2 * rows * inputs * outputs,
            rate,
        )


def nf4_linears(model: Model) -> Iterator[Launch]:
    pointers = {"x_ptr": "*bf16", "codes_ptr": "*u8", "group_scale_ptr": "*u8", "y_ptr": "*bf16"}
    pointers |= dict.fromkeys(("row_scale_ptr", "bias_ptr", "numbers_ptr"), "*fp32")
    # query, key and value of nf4 are in int8
    for name, rows, inputs, outputs, activation in linears(model):
        gated = model.gated and name == "up"
        config = triton_tiles.choose(triton_unpacked.nf4_configs(2, 2), rows, outputs)
        yield Launch(
            triton_unpacked.nf4_linear_fwd_kernel,
            f"{name} {rows} x {inputs} to {outputs}",
            pointers,
            {**config, "HAS_BIAS": not model.rms, "ACTIVATION": activation, "GATED": gated, "PRECISION": "ieee"},
            triton_tiles.programs(config, rows, outputs),
            outputs * inputs // 2 + outputs * inputs // 64 + rows * (2 * inputs + (2 - gated) * outputs) + 8 * outputs,
            2 * rows * inputs * outputs,
            "bf16",
        )


def int8_weight_linears(model: Model) -> Iterator[Launch]:
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*i8", "y_ptr": "*bf16"}
    pointers |= dict.fromkeys(("weight_scale_ptr", "bias_ptr"), "*fp32")
    for name, rows, inputs, outputs, activation in linears(model):
        if name not in ("qkv", "down"):  # of nf4, and of int8
            continue
        config = triton_tiles.choose(triton_unpacked.int8_weight_configs(2, 2), rows, outputs)
        yield Launch(
            triton_unpacked.int8_weight_linear_fwd_kernel,
            f"{name} {rows} x {inputs} to {outputs}",
            pointers,
            {**config, "HAS_BIAS": not model.rms, "ACTIVATION": activation, "GATED": False, "PRECISION": "ieee"},
            triton_tiles.programs(config, rows, outputs),
            outputs * inputs + 2 * rows * (inputs + outputs) + 8 * outputs,
            2 * rows * inputs * outputs,
            "bf16",
        )


def activations(model: Model) -> Iterator[Launch]:
    """Behind bfloat16's product, which is PyTorch's own."""
    for name, rows, _, outputs, activation in linears(model):
        if activation == "none":
            continue
        gated = model.gated and name == "up"
        config = triton_activate.config()
        yield Launch(
            triton_activate.activate_fwd_kernel,
            f"{name} {rows} x {outputs}",
            {"x_ptr": "*bf16", "y_ptr": "*bf16", "bias_ptr": "*fp32"},
            {**config, "HAS_BIAS": not model.rms, "ACTIVATION": activation, "GATED": gated},
            rows * triton.cdiv(outputs, config["BLOCK"]),
            (4 - gated) * rows * outputs + 4 * outputs,
            10 * rows * outputs,
            "none",
        )


def norms(quantised: torch.dtype | None, model: Model) -> Iterator[Launch]:
    size, width = model.tokens * model.width, model.width
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "total_ptr", "y_ptr"), "*bf16")
    pointers |= dict.fromkeys(("weight_ptr", "bias_ptr", "scale_ptr"), "*fp32")
    options = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": not model.rms, "RMS": model.rms}
    yield Launch(
        norm_tap.norm_tap_fwd_kernel,
        f"{model.tokens} x {width}{'' if quantised is None else f', also {quantised}'}",
        pointers | {"values_ptr": POINTER[quantised or torch.int8]},
        {**options, "LARGEST": LARGEST.get(quantised, 0.0), **norm_tap.config(width)},
        model.tokens,
        8 * size + (0 if quantised is None else size + 4 * model.tokens) + 8 * width,
        8 * size,
        "none",
        ("eps",),
    )


def quantised_rows(dtype: torch.dtype, model: Model) -> Iterator[Launch]:
    pointers = {"x_ptr": "*bf16", "smooth_ptr": "*fp32", "values_ptr": POINTER[dtype], "scale_ptr": "*fp32"}
    for width in (model.width, model.layers["down"][0]):
        yield Launch(
            quantise_rows.quantise_rows_fwd_kernel,
            f"{model.tokens} x {width} to {dtype}",
            pointers,
            {"HAS_SMOOTH": False, "LARGEST": LARGEST[dtype], **quantise_rows.config(width)},
            model.tokens,
            3 * model.tokens * width + 4 * model.tokens,
            4 * model.tokens * width,
            "none",
        )


def rotations(model: Model) -> Iterator[Launch]:
    """Of the queries of a model that rotates them."""
    if not model.gated:
        return
    heads, half = model.width // 128, 64
    config = {**triton_rotate.config(heads, half), "BACK": False}
    yield Launch(
        triton_rotate.rotate_fwd_kernel,
        f"{model.tokens} x {heads} x {2 * half}",
        {"x_ptr": "*bf16", "y_ptr": "*bf16", "cosines_ptr": "*fp32", "sines_ptr": "*fp32"},
        config,
        model.tokens * triton.cdiv(heads, config["BLOCK_H"]),
        4 * model.tokens * model.width + 16 * model.tokens * half,
        6 * model.tokens * model.width,
        "none",
    )


# every kernel of the frozen forward; a new one adds what it launches for a model
LAUNCHES: tuple[Callable[[Model], Iterator[Launch]], ...] = (
    functools.partial(norms, None),
    functools.partial(norms, torch.int8),
    functools.partial(norms, FP8),
    functools.partial(quantised_rows, torch.int8),
    functools.partial(quantised_rows, FP8),
    functools.partial(quantised_linears, torch.int8, "int8", triton_quantised.int8_linear_fwd_kernel),
    functools.partial(quantised_linears, FP8, "fp8", triton_quantised.fp8_linear_fwd_kernel),
    nf4_linears,
    int8_weight_linears,
    activations,
    rotations,
)


def blocks_per_multiprocessor(registers: int, shared: int, warps: int) -> dict[str, int]:
    """How many blocks registers, shared memory and warps leave room for."""
    # registers are given to a warp 256 at a time
    of_a_warp = -(-registers * 32 // 256) * 256
    return {
        "registers": REGISTERS // of_a_warp // warps,
        "shared memory": SHARED // (shared + RESERVED),
        "warps": min(WARPS // warps, BLOCKS),
    }


@functools.cache
def _compiled(kernel: Any, pointers: str, config: str, floats: tuple[str, ...]) -> dict[str, int]:
    compiled = compile_kernel(kernel, json.loads(pointers), json.loads(config), CAPABILITY, floats, ())
    used = resources(compiled.asm["cubin"])
    return {"registers": used["registers"], "shared": compiled.metadata.shared}


def entry(model: Model, launch: Launch) -> dict[str, Any]:
    used = _compiled(launch.kernel, json.dumps(launch.pointers), json.dumps(launch.config), launch.floats)
    room = blocks_per_multiprocessor(used["registers"], used["shared"], launch.config["num_warps"])
    seconds = {
        "bytes": launch.moved_bytes / BYTES_PER_SECOND,
        "operations": launch.flops / FLOPS_PER_SECOND[launch.rate],
    }
    bound = max(seconds, key=seconds.__getitem__)
    tiles = {key: value for key, value in launch.config.items() if "BLOCK" in key or key in ("GROUPS", *LAUNCH_OPTIONS)}
    return {
        "kernel": launch.kernel.__name__,
        "model": model.name,
        "shape": launch.shape,
        "tile": tiles,
        "programs": launch.programs,
        **used,
        "blocks_per_multiprocessor": min(room.values()),
        "limited_by": min(room, key=room.__getitem__),
        "occupancy": min(room.values()) * launch.config["num_warps"] / WARPS,
        "waves": round(launch.programs / (MULTIPROCESSORS * min(room.values())), 2),
        "bytes": launch.moved_bytes,
        "flops": launch.flops,
        "floor_microseconds": float(f"{1e6 * seconds[bound]:.3g}"),
        "bound": bound,
    }


def report() -> dict[str, Any]:
    """The whole report, as plain JSON types."""
    rates = {name: rate for name, rate in FLOPS_PER_SECOND.items() if name != "none"}
    return {
        "gpu": "H200, not run: figures of the compiler, and floors at measured rates",
        "capability": CAPABILITY,
        "triton": triton.__version__,
        "bytes_per_second": BYTES_PER_SECOND,
        "flops_per_second": rates,
        "kernels": [entry(model, launch) for model in MODELS for launches in LAUNCHES for launch in launches(model)],
    }


if __name__ == "__main__":
    print(json.dumps(report(), indent=1, sort_keys=True))
