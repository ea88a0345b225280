"""Compiles every kernel of frozen linear layers ahead of time and prints one JSON line each."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops.frozen_linear import triton_activate, triton_quantised, triton_unpacked

Source = tuple[object, dict[str, str], dict, dict[str, str]]  # kernel, pointer types, constants, the case's names


def quantised(capability: int, activation: str, y_dtype: torch.dtype, gated: bool = False) -> Iterator[Source]:
    kernels = {torch.int8: triton_quantised.int8_linear_fwd_kernel}
    if capability >= 90:
        kernels[torch.float8_e4m3fn] = triton_quantised.fp8_linear_fwd_kernel
    configs = triton_quantised.quantised_configs(capability, activation, y_dtype.itemsize, gated)
    if activation == ("silu" if gated else "none"):  # takes fewer registers: only the tiles that others may not take
        others = triton_quantised.quantised_configs(capability, "gelu", y_dtype.itemsize, gated)
        configs = [config for config in configs if config not in others]
    for (dtype, kernel), config in itertools.product(kernels.items(), configs):
        pointers = {"values_ptr": POINTER[dtype], "weight_ptr": POINTER[dtype], "y_ptr": POINTER[y_dtype]}
        pointers |= dict.fromkeys(("row_scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32")
        yield kernel, pointers, {"GATED": gated, **config}, {"x": str(dtype), "y": str(y_dtype)}


def unpacked(x_dtype: torch.dtype, y_dtype: torch.dtype, gated: bool = False) -> Iterator[Source]:
    shared = {"x_ptr": POINTER[x_dtype], "y_ptr": POINTER[y_dtype], "bias_ptr": "*fp32"}
    constants, case = {"PRECISION": "ieee", "GATED": gated}, {"x": str(x_dtype), "y": str(y_dtype)}
    pointers = shared | {"codes_ptr": "*u8", "group_scale_ptr": "*u8", "row_scale_ptr": "*fp32", "numbers_ptr": "*fp32"}
    for config in triton_unpacked.nf4_configs(x_dtype.itemsize, y_dtype.itemsize):
        yield triton_unpacked.nf4_linear_fwd_kernel, pointers, constants | config, case
    pointers = shared | {"weight_ptr": "*i8", "weight_scale_ptr": "*fp32"}
    for config in triton_unpacked.int8_weight_configs(x_dtype.itemsize, y_dtype.itemsize):
        yield triton_unpacked.int8_weight_linear_fwd_kernel, pointers, constants | config, case


def activations(gated: bool) -> Iterator[Source]:
    pointers = {"x_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
    constants = {"GATED": gated, **triton_activate.config()}
    yield triton_activate.activate_fwd_kernel, pointers, constants, {"x": "torch.bfloat16", "y": "torch.bfloat16"}


def main(capability: int) -> None:
    half, whole = torch.bfloat16, torch.float32
    # gelu takes the most registers of the activations; float16 compiles as bfloat16 does
    cases = [
        *((source, "gelu") for x, y in ((half, half), (whole, whole), (half, whole)) for source in unpacked(x, y)),
        *((source, "gelu") for y in (half, whole) for source in quantised(capability, "gelu", y)),
        *((source, "none") for source in quantised(capability, "none", half)),
        *((source, "gelu_tanh") for source in unpacked(half, half, True)),
        *((source, act) for act in ("gelu_tanh", "silu") for source in quantised(capability, act, half, True)),
        *((source, "gelu") for gated in (False, True) for source in activations(gated)),
    ]
    for (kernel, pointers, config, names), activation in cases:
        tile = {name: value for name, value in config.items() if name not in ("PRECISION", "GROUP", "GATED")}
        constants = {**config, "HAS_BIAS": True, "ACTIVATION": activation}
        odd = ("M", "N", "stride_x") if names["y"] == "torch.float32" else ("M",)
        compiled = compile_kernel(kernel, pointers, constants, capability, (), odd)
        report(kernel, compiled, **names, activation=activation, gated=config["GATED"], tile=tile)


if __name__ == "__main__":
    main(int(sys.argv[1]))
