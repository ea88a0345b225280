"""The native library's codes of activations and formats: enum tl_activation and tl_weight_format in csrc/tlfast.h."""

from __future__ import annotations

ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "relu": 3, "silu": 4, "none": 5}
FORMAT_CODES = {"bf16": 0, "int8": 1, "nf4": 2, "int8_weight_only": 3, "fp32": 4}
