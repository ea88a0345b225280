"""tlfast doctor: what is here, and which implementation each operation takes and why."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from .. import _native, ops
from ..backbone.freezing import PRECISIONS
from ..backbone.packed_block import FP32_WIDTH
from ..bench import measure
from ..ops.frozen_linear import automatic, why_not_fp8
from ..ops.packed_blocks import pays_in_float32
from .output import emit

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def doctor(as_json: Json = False) -> None:
    """Say what is here: versions, native library, GPU, and each operation's implementations."""
    found = examine()
    emit(found, report(found), as_json)


def examine() -> dict[str, Any]:
    """All findings as plain JSON types; what is missing is None, or the reason why."""
    return {
        **measure.environment(),
        "native": _examine_native(),
        "gpus": _examine_gpus(),
        "frozen": _examine_frozen(),
        "ops": ops.describe(),
    }


def report(found: dict[str, Any]) -> list[str]:
    """The findings in lines for people."""
    machine, native = found["machine"], found["native"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    lines = [
        f"versions        {versions}",
        f"processor       {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} PyTorch threads, "
        f"PyTorch uses {machine['torch_isa']}",
        f"native library  {_native_line(native)}",
        f"GPU             {_gpu_line(found)}",
        "frozen forward",
        *(f"  {precision:<4}  {_frozen_line(row)}" for precision, row in found["frozen"].items()),
        "operations",
    ]
    for name, op in found["ops"].items():
        lines.append(f'  {name}: "auto" takes {op["auto"]} ({op["why"]})')
        width = max(map(len, op["implementations"]))
        lines += [f"    {impl:<{width}}  {state}" for impl, state in op["implementations"].items()]
    return lines


def _examine_native() -> dict[str, Any]:
    reason = _native.why_not()
    return {"loaded": False, "why_not": reason} if reason else {"loaded": True, **_native.build_info()}


def _examine_gpus() -> list[dict[str, Any]]:
    """Each CUDA device: name, compute capability, memory in bytes."""
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_bytes": d.total_memory} for d in devices]


def _examine_frozen() -> dict[str, dict[str, Any]]:
    """For each precision of freeze() how blocks run here: "path" and "why", and what the operations of a path take.

    "path" is "packed", "module" or "refused". Which families take the packed path, and why others do not, is
    `FrozenBackbone.describe`'s.
    """
    found: dict[str, dict[str, Any]] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for precision in PRECISIONS:
        linear, why = automatic(precision)
        refused = why_not_fp8(device) if precision == "fp8" else None
        if refused is not None:
            found[precision] = {"path": "refused", "why": refused}
            continue
        if precision == "fp32" and linear != "native":
            found[precision] = {"path": "module", "why": why}
            continue
        if precision == "fp32" and not pays_in_float32():
            linear, why = "PyTorch", f"no clear gain by {_native.matrix_isa()} in a trial"
        attention = ops.describe()["packed_attention"]
        found[precision] = {
            "path": "packed",
            "why": f"from width {FP32_WIDTH} on, for the families that have it"
            if precision == "fp32"
            else "for the families that have it",
            "frozen_linear": {"auto": linear, "why": why},
            "packed_attention": {"auto": attention["auto"], "why": attention["why"]},
        }
    return found


def _frozen_line(row: dict[str, Any]) -> str:
    if row["path"] == "refused":
        return f"refused: {row['why']}"
    if row["path"] == "module":
        return f"blocks as transformers runs them: {row['why']}"
    taken = (f"{op} {row[op]['auto']} ({row[op]['why']})" for op in ("frozen_linear", "packed_attention"))
    return f"blocks over packed tokens {row['why']}: {', '.join(taken)}"


def _native_line(native: dict[str, Any]) -> str:
    if not native["loaded"]:
        return f"missing: {native['why_not']}"
    cuda = native["cuda_architectures"]
    built = f"CUDA kernels for sm {cuda}" if cuda else "no CUDA kernels: it was built without nvcc"
    return f"loaded; CPU kernels use {native['cpu_isa']}; {built}"


def _gpu_line(found: dict[str, Any]) -> str:
    cuda = found["machine"]["cuda"]
    if not found["gpus"]:
        return f"none visible (PyTorch built for CUDA {cuda})" if cuda else "none (this PyTorch is built without CUDA)"
    devices = (f"{g['name']}, sm {g['capability']}, {g['memory_bytes'] / 2**30:.0f} GiB" for g in found["gpus"])
    return f"{'; '.join(devices)} (PyTorch built for CUDA {cuda})"
