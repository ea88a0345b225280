"""The reductions that contrastive losses are made of: what they return, PyTorch's machinery, choice and refusals."""

from __future__ import annotations

import pytest
import torch

from tests.contrastive.cases import IMPLS, LEAN, needs_native
from tests.ops.interpreter import interpreted
from tlfast import ops
from tlfast.ops import contrastive_sigmoid, contrastive_softmax

SHAPES = [(1, 1, 0), (1, 5, 3), (5, 5, 0), (63, 100, 20), (65, 65, 0), (70, 200, 130)]


def make(rows, columns, width=20, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(rows, width).to(dtype), torch.randn(columns, width).to(dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows, columns, offset", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_columns_and_own_pairs(impl, rows, columns, offset):
    u, v = make(rows, columns)
    scores = 3 * u.double() @ v.double().T
    own = scores.diagonal(offset)[:rows]
    found_rows, found_columns, found_own = contrastive_softmax(u, v, 3.0, offset, impl)
    close = {"check_dtype": False, "rtol": 2e-6, "atol": 1e-5}
    torch.testing.assert_close(found_own, own, **close)
    torch.testing.assert_close(torch.logaddexp(found_rows, found_own), scores.logsumexp(1), **close)
    others = scores.diagonal_scatter(torch.full((rows,), -torch.inf, dtype=torch.float64), offset)
    torch.testing.assert_close(found_rows, others.logsumexp(1), **close)
    torch.testing.assert_close(found_columns, others.logsumexp(0), **close)
    sums, sigmoid_own = contrastive_sigmoid(u, v, 3.0, -2.0, offset, impl)
    torch.testing.assert_close(sigmoid_own, own, **close)
    torch.testing.assert_close(sums, (others - 2).exp().log1p().sum(1), **close)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows, columns, offset", SHAPES)
@pytest.mark.parametrize("impl", LEAN)
def test_gradients_of_every_output(impl, rows, columns, offset):
    def gradients(impl, dtype):
        inputs = [*make(rows, columns, dtype=dtype), torch.tensor(0.7, dtype=dtype), torch.tensor(-1.0, dtype=dtype)]
        u, v, scale, bias = (x.requires_grad_() for x in inputs)
        outputs = [x.clamp(min=-100) for x in contrastive_softmax(u, v, scale, offset, impl)]
        outputs += contrastive_sigmoid(u, v, scale, bias, offset, impl)
        total = sum((x * torch.linspace(1, 2, len(x), dtype=dtype)).sum() for x in outputs)
        return torch.autograd.grad(total, (u, v, scale, bias))

    exact = gradients("reference", torch.float64)
    for found, expected in zip(gradients(impl, torch.float32), exact, strict=True):
        error = (found.double() - expected).norm()
        assert error <= 2e-6 * expected.norm() + 1e-6


@pytest.mark.parametrize("impl", ["reference", "recompute"])
def test_gradcheck(impl):
    u, v = (x.requires_grad_() for x in make(4, 6, 3, torch.float64))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, -0.4))
    assert torch.autograd.gradcheck(lambda *x: contrastive_softmax(*x, 1, impl), (u, v, scale))
    assert torch.autograd.gradcheck(lambda *x: contrastive_sigmoid(*x, 1, impl), (u, v, scale, bias))
    if impl == "reference":
        assert torch.autograd.gradgradcheck(lambda *x: contrastive_sigmoid(*x, 1, impl), (u, v, scale, bias))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["recompute", "native"])
def test_opcheck(impl, dtype):
    u, v = make(7, 9, dtype=dtype)
    scale, bias, offset = torch.tensor(2.0), torch.tensor(-1.0), 1
    library = torch.ops.tlfast
    softmax = (u, v, scale, offset, impl)
    torch.library.opcheck(library.contrastive_softmax_fwd.default, softmax)
    rows, columns, own = library.contrastive_softmax_fwd(*softmax)
    torch.library.opcheck(library.contrastive_sigmoid_fwd.default, (u, v, scale, bias, offset, impl))
    for needs in ((True, True), (True, False), (False, True)):
        softmax = (rows, columns, own, u, v, scale, rows, columns, offset, *needs, impl)
        torch.library.opcheck(library.contrastive_softmax_bwd.default, softmax)
        torch.library.opcheck(
            library.contrastive_sigmoid_bwd.default, (rows, own, u, v, scale, bias, offset, *needs, impl)
        )


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    from tlfast.ops.contrastive import native

    monkeypatch.setattr(native, "TILE", 128)
    # the product's bits are PyTorch's affair
    monkeypatch.setattr(native, "_multiply", lambda u, v, out: out.copy_((u[:, None] * v).sum(-1)))
    u, v = make(150, 190)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((*contrastive_softmax(u, v, 3.0, 5, "native"), *contrastive_sigmoid(u, v, 3.0, 0.5, 5, "native")))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4", "vnni"])
def test_every_instruction_set_is_accurate(isa, fresh_process):
    code = (
        "import torch, tlfast\n"
        "torch.manual_seed(0); u, v = torch.randn(2, 130, 70); u, v = u.requires_grad_(), v.requires_grad_()\n"
        "def step(u, v, impl):\n"
        "    rows, columns, own = tlfast.ops.contrastive_softmax(u, v, 2.0, 0, impl)\n"
        "    sums, _ = tlfast.ops.contrastive_sigmoid(u, v, 2.0, -3.0, 0, impl)\n"
        "    total = (rows - own).sum() + columns.sum() + sums.sum()\n"
        "    return total.detach(), *torch.autograd.grad(total, (u, v))\n"
        "exact = step(u.double(), v.double(), 'reference')\n"
        "print([bool((a - b).norm() <= 2e-6 * b.norm()) for a, b in zip(step(u, v, 'native'), exact)])\n"
    )
    assert fresh_process(code, TLFAST_CPU_ISA=isa) == "[True, True, True]"


def test_nan_is_passed_on():
    u, v = make(9, 9)
    u[3, 2] = torch.nan
    for impl in ("reference", "recompute", "native"):
        if ops.implementations("contrastive_softmax")[impl] != "available":
            continue
        rows, columns, own = contrastive_softmax(u, v, 1.0, impl=impl)
        assert rows[3].isnan() and own[3].isnan() and columns[torch.arange(9) != 3].isnan().all()
        assert rows[torch.arange(9) != 3].isfinite().all()
        assert contrastive_sigmoid(u, v, 1.0, 0.0, impl=impl)[0][3].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    u, v = make(0, 4)
    rows, columns, own = contrastive_softmax(u, v, 1.0, impl=impl)
    assert rows.shape == own.shape == (0,) and torch.equal(columns, torch.full((4,), -torch.inf))
    assert contrastive_sigmoid(u, v, 1.0, 0.0, impl=impl)[0].shape == (0,)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"u": torch.ones(3)}, ["u", "(rows, D)", "(3,)"]),
        ({"v": torch.ones(3, 5)}, ["v", "(M, 4)", "(3, 5)"]),
        ({"v": torch.ones(3, 4).double()}, ["v", "float32", "float64"]),
        ({"v": torch.ones(2, 4)}, ["offset", "M - N", "(2, 4)"]),
        ({"offset": 1}, ["offset", "its own column", "1"]),
        ({"offset": -1}, ["offset", "-1"]),
    ],
)
def test_misuse(change, words):
    given = {"u": torch.ones(3, 4), "v": torch.ones(3, 4), "scale": 1.0}
    with pytest.raises(ValueError) as error:
        contrastive_softmax(**{**given, **change})
    for word in words:
        assert word in str(error.value)


@needs_native
def test_a_named_implementation_never_falls_back():
    u, v = make(3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*float64.*recompute"):
        contrastive_softmax(u, v, 1.0, impl="native")
    assert contrastive_softmax(u, v, 1.0)[0].dtype == torch.float64
    assert set(ops.implementations("contrastive_sigmoid")) == {"reference", "recompute", "native", "triton"}
    assert ops.describe()["contrastive_softmax"]["auto"] in ("native", "triton")


@interpreted
def test_what_triton_cannot_take_is_refused():
    u, v = make(3, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        contrastive_softmax(u, v, 1.0, impl="triton")
