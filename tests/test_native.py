"""The native library: how it loads, which code it runs on which machine, whose threads it uses, how it rounds."""

from __future__ import annotations

import pytest
import torch

from tlfast import _native
from tlfast.ops import rung
from tlfast.ops.hmpnn_layer.products import times_transposed

LOAD = "import tlfast, torch; from tlfast import _native; from tlfast.ops import implementations, rung\n"
INPUTS = "torch.manual_seed(0); h, s, w = torch.randn(40, 12), torch.randn(40, 70), torch.randn(70, 12)\n"


def test_build_info():
    info = _native.build_info()
    assert info["cpu_isa"] in ("x86-64", "x86-64-v3", "x86-64-v4", "generic")
    assert set(info["cuda_architectures"].split(",")) <= {"", "80", "90", "100"}
    assert info["thread_pool"] in ("OpenMP pool of this process", "own threads")
    assert _native.why_not() is None


def test_import_stays_light(fresh_process):
    code = "import sys, tlfast; print([x for x in ('triton', 'transformers', 'torch_geometric') if x in sys.modules])"
    assert fresh_process(code) == "[]"


def test_blocked_library(fresh_process):
    code = (
        LOAD
        + INPUTS
        + (
            "assert implementations('rung')['native'] == 'blocked by TLFAST_DISABLE_NATIVE', implementations('rung')\n"
            "a = torch.zeros(())\n"
            "assert torch.equal(rung(h, s, w, None, a), rung(h, s, w, None, a, impl='reference'))\n"
            "for call in (_native.library, _native.build_info, lambda: rung(h, s, w, None, a, impl='native')):\n"
            "    try: call()\n"
            "    except RuntimeError as error: print('blocked by TLFAST_DISABLE_NATIVE' in str(error))\n"
            "print(tlfast.ops.describe()['rung']['auto'], '|', tlfast.ops.describe()['rung']['why'])\n"
        )
    )
    lines = fresh_process(code, TLFAST_DISABLE_NATIVE="1", CUDA_VISIBLE_DEVICES="").splitlines()
    assert lines == ["True"] * 3 + ["reference | no native: blocked by TLFAST_DISABLE_NATIVE"]


def test_missing_library(fresh_process):
    code = "import sys; sys.modules['tlfast._C'] = None\n" + LOAD + "print(_native.why_not())"
    assert "native library not loaded" in fresh_process(code)
    assert "pip install" in fresh_process(code)


def test_blocked_triton(fresh_process):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        + LOAD
        + INPUTS
        + (
            "print(implementations('rung')['triton'])\n"
            "rung(h, s, w, None, torch.zeros(()))\n"
            "try: rung(h, s, w, None, torch.zeros(()), impl='triton')\n"
            "except RuntimeError as error: print(error)\n"
        )
    )
    reason, error = fresh_process(code).splitlines()
    assert reason == "triton is not installed; pip install triton"
    assert error == f"rung: impl='triton' cannot run: {reason}"


@pytest.mark.parametrize("isa", ["base", "v3"])
def test_every_instruction_set_agrees(isa, fresh_process):
    code = (
        LOAD
        + INPUTS
        + (
            "s = s.requires_grad_(); a = torch.linspace(-0.1, 0.1, 70).requires_grad_()\n"
            "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
            "    side = s.detach().to(dtype).requires_grad_()\n"
            "    z = rung(h.to(dtype), side, w.to(dtype), None, a, impl='native')\n"
            "    ds, da = torch.autograd.grad(z.float().square().sum(), (side, a))\n"
            "    print(z.double().sum().item(), ds.double().sum().item(), da.double().sum().item())\n"
            "print(_native.build_info()['cpu_isa'])\n"
        )
    )
    *expected, best = fresh_process(code).splitlines()
    *found, used = fresh_process(code, TLFAST_CPU_ISA=isa).splitlines()
    if best in ("generic", "x86-64"):
        pytest.skip(f"this machine has one instruction set, {best}")
    assert used == {"base": "x86-64", "v3": "x86-64-v3"}[isa]
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours.split(), theirs.split(), strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-5)  # the order of no sum differs: fused roundings do


def test_joins_the_thread_pool_of_torch(fresh_process):
    """A second pool would oversubscribe the cores: after torch has made its threads, the library adds none."""
    code = LOAD + (
        "import os\n"
        "torch.set_num_threads(3)\n"
        "(torch.randn(800, 800) @ torch.randn(800, 800)).exp_()\n"
        "h, s, w = torch.randn(20000, 8), torch.randn(20000, 96), torch.randn(96, 8)\n"
        "torch.nn.functional.linear(h, w)\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "for _ in range(20): rung(h, s, w, None, torch.zeros(()), impl='native')\n"
        "print(_native.build_info()['thread_pool'], len(before) >= 3, before == set(os.listdir('/proc/self/task')))\n"
    )
    assert fresh_process(code) == "OpenMP pool of this process True True"


def test_a_bad_call_raises_with_the_reason():
    x = torch.zeros(4)
    pointers = [_native.pointer(x)] * 5
    with pytest.raises(RuntimeError, match="alpha has 3 entries; allowed: 1 or the width 2"):
        _native.library().rung_forward_cpu(*pointers, 2, 2, 3, 2, 2, 0, 0, 0.1, 1)
    with pytest.raises(RuntimeError, match="unknown dtype code 9"):
        _native.library().rung_forward_cpu(*pointers, 2, 2, 1, 2, 2, 9, 0, 0.1, 1)


def through_the_blend(p: torch.Tensor, dtype: torch.dtype, gate: float) -> torch.Tensor:
    """p as the library loads it and, rounded, stores it: a shut gate passes the side state, an open one the product."""
    if gate > 0:
        h, s = torch.zeros(1, 1, dtype=p.dtype), p.unsqueeze(0)
        weight = torch.zeros(p.numel(), 1)
    else:
        h, s = torch.ones(1, 1, dtype=p.dtype), torch.zeros(1, p.numel(), dtype=dtype)
        weight = p.unsqueeze(1)
    return rung(h, s, weight, None, torch.tensor(gate), impl="native").squeeze(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_survives(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    back = through_the_blend(every, dtype, gate=1000.0)
    assert torch.equal(back.isnan(), every.isnan())
    assert torch.equal(back[~every.isnan()], every[~every.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_is_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    everywhere = bits.view(torch.float32)
    # where float16 has subnormals, its normal range, overflow; and halfway between two numbers
    near = torch.randn(1 << 18, generator=generator) * torch.tensor(2.0).pow(torch.arange(1 << 18) % 44 - 27)
    halfway = (near.half().float() + near.half().nextafter(torch.tensor(torch.inf).half()).float()) / 2
    p = torch.cat([everywhere[everywhere.isfinite()], near, halfway])
    back, expected = through_the_blend(p, dtype, gate=-1000.0), p.to(dtype)
    assert torch.equal(back.isnan(), expected.isnan())
    assert torch.equal(back[~expected.isnan()], expected[~expected.isnan()])


def of_all_sizes(rows, least, most, seed):
    generator = torch.Generator().manual_seed(seed)
    exponent = least + (most - least) * torch.rand(rows, 384, generator=generator)
    return torch.randn(rows, 384, generator=generator).sign() * torch.tensor(10.0).pow(exponent)


@pytest.mark.skipif(_native.why_not() is not None or _native.matrix_isa() != "AMX", reason="needs AMX")
@pytest.mark.parametrize("rows", [1, 33, 768])
@pytest.mark.parametrize("sizes", [(-44, 0), (36, 38.53)])
def test_products_in_parts_take_numbers_of_all_sizes(rows, sizes):
    """Down to those whose parts are below the smallest normal number, up to those above bfloat16's largest."""
    x, w = of_all_sizes(rows, *sizes, 0), of_all_sizes(48, -40, -3, 1)
    y = times_transposed(x, w)
    exact, most = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert ((y - exact).abs() <= 1e-6 * most + 384 * 2.0**-126 * (x.abs().max() + 1)).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: test_rung_gpu.py launches the kernels")
def test_a_launch_without_a_gpu_raises():
    if not _native.build_info()["cuda_architectures"]:
        pytest.skip("native library built without CUDA")
    x = torch.zeros(2, 2)
    for call in (
        lambda: _native.library().rung_forward_cuda(*[_native.pointer(x)] * 5, 2, 2, 1, 2, 2, 0, 0, 0.1, 0),
        lambda: _native.library().rung_backward_cuda(*[_native.pointer(x)] * 7, 2, 2, 1, 2, 2, 2, 0, 0.1, 0),
    ):
        with pytest.raises(RuntimeError, match=r"rung: CUDA launch failed: .*(driver|device)"):
            call()
