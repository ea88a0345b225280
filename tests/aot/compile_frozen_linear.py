"""Compiles every kernel of frozen linear layers ahead of time and prints one JSON line each."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops.frozen_linear import triton as frozen_linear

Source = tuple[object, dict[str, str], dict, dict[str, str]]  # kernel, pointer types, constants, the case's names


def quantised(capability: int, activation: str, y_dtype: torch.dtype) -> Iterator[Source]:
    kernels = {torch.int8: frozen_linear.int8_linear_fwd_kernel}
    if capability >= 90:
        kernels[torch.float8_e4m3fn] = frozen_linear.fp8_linear_fwd_kernel
    configs = frozen_linear.quantised_configs(capability, activation, y_dtype.itemsize)
    for (dtype, kernel), config in itertools.product(kernels.items(), configs):
        pointers = {"values_ptr": POINTER[dtype], "weight_ptr": POINTER[dtype], "y_ptr": POINTER[y_dtype]}
        pointers |= dict.fromkeys(("row_scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32")
        yield kernel, pointers, config, {"x": str(dtype), "y": str(y_dtype)}


def nf4(x_dtype: torch.dtype) -> Iterator[Source]:
    pointers = {"x_ptr": POINTER[x_dtype], "y_ptr": POINTER[x_dtype], "codes_ptr": "*u8", "group_scale_ptr": "*u8"}
    pointers |= dict.fromkeys(("row_scale_ptr", "bias_ptr", "numbers_ptr"), "*fp32")
    for config in frozen_linear.nf4_configs(x_dtype.itemsize):
        case = {"x": str(x_dtype), "y": str(x_dtype)}
        yield frozen_linear.nf4_linear_fwd_kernel, pointers, {"PRECISION": "ieee", **config}, case


def main(capability: int) -> None:
    # gelu takes the most registers of the activations; float16 compiles as bfloat16 does
    cases = [
        *((source, "gelu") for dtype in (torch.bfloat16, torch.float32) for source in nf4(dtype)),
        *(
            (source, "gelu")
            for dtype in (torch.bfloat16, torch.float32)
            for source in quantised(capability, "gelu", dtype)
        ),
        *((source, "none") for source in quantised(capability, "none", torch.bfloat16)),
    ]
    for (kernel, pointers, config, names), activation in cases:
        tile = {name: value for name, value in config.items() if name not in ("PRECISION", "GROUP")}
        constants = {**config, "HAS_BIAS": True, "ACTIVATION": activation}
        odd = ("M", "N", "stride_x") if names["y"] == "torch.float32" else ("M",)
        compiled = compile_kernel(kernel, pointers, constants, capability, (), odd)
        report(kernel, compiled, **names, activation=activation, tile=tile)


if __name__ == "__main__":
    main(int(sys.argv[1]))
