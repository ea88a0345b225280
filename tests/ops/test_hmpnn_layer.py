"""The folded layer against its formula in float64, and the products under it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tests.ops.graph_cases import make_relation
from tests.ops.norm_cases import needs_native
from tlfast import ops
from tlfast.ops import LayerPlan, hmpnn_layer
from tlfast.ops.hmpnn_layer import project, reference
from tlfast.ops.hmpnn_layer.products import times_transposed, transposed_times

NODES = (40, 13, 7)


def make_plan():
    """Both ways between types, a loop, a relation without edges, and targets of which few or most have no edge."""
    sizes = [(0, 1, 90), (1, 0, 60), (0, 0, 200), (2, 1, 0), (1, 2, 30), (0, 2, 3), (2, 0, 12)]
    return LayerPlan(NODES, [(s, make_relation(NODES[s], NODES[t], e, seed=s + t), t) for s, t, e in sizes])


def make(plan, width=24, dtype=torch.float32):
    torch.manual_seed(0)
    h = [torch.randn(n, width).to(dtype) for n in plan.num_nodes]
    own = [torch.randn(width, width) / width**0.5 for _ in h]
    p, q = ([torch.randn(width, width) / width**0.5 for _ in plan.relations] for _ in range(2))
    return [h, own, p, q]


def run(function, inputs, plan, dh, used=(0, 1, 2)):
    leaves = [[t.detach().clone().requires_grad_() for t in tensors] for tensors in inputs]
    out = function(*leaves, plan)
    flat = [t for tensors in leaves for t in tensors]
    loss = sum((out[t] * dh[t].to(out[t].dtype)).sum() for t in used)
    gradients = torch.autograd.grad(loss, flat, allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(flat, gradients, strict=True)]


@pytest.mark.usefixtures("poisoned", "two_threads")
@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_accuracy(impl, dtype, used):
    plan = make_plan()
    inputs = make(plan, dtype=dtype)
    exact_inputs = [[t.double() for t in tensors] for tensors in inputs]
    dh = [torch.randn(n, 24) for n in NODES]
    exact = reference.hmpnn_layer(*exact_inputs, plan)
    dh = [g * (e.abs() > 0.05) for g, e in zip(dh, exact, strict=True)]  # no sign that rounding decides
    truth = run(reference.hmpnn_layer, exact_inputs, plan, dh, used)
    # peer: the formula with every operand and result rounded to the dtype, as PyTorch's operations would
    rounded = [[t.to(dtype).float() for t in tensors] for tensors in inputs]
    ours = run(lambda *a: hmpnn_layer(*a, impl=impl), inputs, plan, dh, used)
    peer = run(reference.hmpnn_layer, rounded, plan, dh, used)
    scale = 2 * torch.finfo(dtype).eps
    for part, (mine, plain, true) in enumerate(zip(ours, peer, truth, strict=True)):
        for i, (a, b, c) in enumerate(zip(mine, plain, true, strict=True)):
            largest = float(c.detach().abs().max())
            assert_within_budget(f"{part}.{i}", a.detach(), b.detach().to(a.dtype), c.detach(), scale * largest)


@needs_native
@pytest.mark.parametrize("isa", ["v4", "amx"])
def test_autocast_changes_nothing(isa, fresh_process):
    """Also without AMX, where the products are PyTorch's, and with corrections for nodes that have no edge."""
    code = """
import torch
from tests.ops.test_hmpnn_layer import NODES, make, make_plan, run
from tlfast.ops import hmpnn_layer
plan = make_plan()
inputs, dh = make(plan), [torch.ones(n, 24) for n in NODES]
out, gradients = run(hmpnn_layer, inputs, plan, dh)
with torch.autocast("cpu", torch.bfloat16):
    cast, cast_gradients = run(hmpnn_layer, inputs, plan, dh)
    with torch.no_grad():
        eager = hmpnn_layer(*inputs, plan)
pairs = (out, cast), (gradients, cast_gradients), (out, eager)
print([all(map(torch.equal, *pair)) for pair in pairs])
"""
    assert fresh_process(code, TLFAST_CPU_ISA=isa) == "[True, True, True]"


def test_what_aggregates_first():
    plan = make_plan()
    for i, (source, relation, target) in enumerate(plan.relations):
        if not relation.num_edges:
            assert not any(i in lists for lists in (*plan.outgoing, *plan.pooled, *plan.constant))
        else:
            assert (i in plan.pooled[target]) == (NODES[target] < NODES[source])
    for target, corrections in enumerate(plan.corrections):
        assert all(2 * correction.rows.numel() <= NODES[target] for correction in corrections)


def test_gradcheck():
    plan = LayerPlan((4, 3), [(0, make_relation(4, 3, 5), 1), (1, make_relation(3, 4, 6), 0)])
    tensors = [t.double().requires_grad_() for tensors in make(plan, width=3) for t in tensors]

    def layer(*flat):
        return tuple(hmpnn_layer(flat[:2], flat[2:4], flat[4:6], flat[6:], plan))

    assert torch.autograd.gradcheck(layer, tensors)


@needs_native
def test_opcheck():
    plan = make_plan()
    h, own, p, q = make(plan)
    torch.library.opcheck(torch.ops.tlfast.hmpnn_layer_fwd.default, (h, own, p, q, plan.key, "native"))
    out = torch.ops.tlfast.hmpnn_layer_fwd.default(h, own, p, q, plan.key, "native")
    dout = [torch.ones_like(h[0]), None, torch.ones_like(h[2])]
    for need_dh in (True, False):
        arguments = (dout, h, out[:3], out[3:], own, p, q, need_dh, plan.key, "native")
        torch.library.opcheck(torch.ops.tlfast.hmpnn_layer_bwd.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_into_one_graph(impl):
    plan = make_plan()
    inputs, dh = make(plan), [torch.randn(n, 24) for n in NODES]
    compiled = torch.compile(lambda *a: hmpnn_layer(*a, impl=impl), fullgraph=True, backend="aot_eager")
    ours, eager = run(compiled, inputs, plan, dh), run(lambda *a: hmpnn_layer(*a, impl=impl), inputs, plan, dh)
    for part, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(part, expected)


@needs_native
def test_a_plan_lives_until_its_backward_pass():
    plan = make_plan()
    inputs = make(plan)
    inputs[1] = [w.requires_grad_() for w in inputs[1]]
    out = hmpnn_layer(*inputs, plan, impl="native")
    del plan
    sum(state.sum() for state in out).backward()
    assert all(w.grad is not None for w in inputs[1])


@needs_native
def test_nothing_of_edges_times_width_is_allocated():
    plan = LayerPlan((30, 20), [(0, make_relation(30, 20, 4000), 1), (1, make_relation(20, 30, 4000), 0)])
    inputs, dh = make(plan, width=64), [torch.randn(n, 64) for n in (30, 20)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        run(lambda *a: hmpnn_layer(*a, impl="native"), inputs, plan, dh, (0, 1))
    assert max(event.self_cpu_memory_usage for event in trace.events()) < 4000 * 64


@pytest.mark.usefixtures("poisoned", "two_threads")
@given(rows=st.integers(1, 400), inner=st.integers(1, 100), outer=st.integers(1, 100))
def test_products(rows, inner, outer):
    torch.manual_seed(rows)
    x, w, g = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer + 3)[:, 3:]
    room = torch.ones(rows, outer + 5)
    y = times_transposed(x, w, add_to=room[:, 2 : 2 + outer])
    assert y.data_ptr() == room[:, 2:].data_ptr() and (room[:, :2] == 1).all() and (room[:, 2 + outer :] == 1).all()
    pairs = {
        "x w^T": (times_transposed(x, w), x @ w.t(), x.double() @ w.double().t()),
        "1 + x w^T": (y.contiguous(), 1 + x @ w.t(), 1 + x.double() @ w.double().t()),
        "g^T x": (transposed_times(g, x), g.t() @ x, g.double().t() @ x.double()),
    }
    for name, (ours, plain, exact) in pairs.items():
        assert_within_budget(name, ours, plain, exact, torch.finfo(torch.float32).eps * float(exact.abs().max()))


def test_products_of_any_strides():
    x, w = torch.randn(24, 40).t(), torch.randn(24, 16).t()
    torch.testing.assert_close(times_transposed(x, w), x @ w.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_products_keep_what_is_not_finite_in_its_row(special):
    x, w = torch.randn(40, 33), torch.ones(20, 33)
    x[3, 5] = special
    y = times_transposed(x, w)
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"h": [torch.zeros(3, 2)]}, ["h and own", "2 types", "1"]),
        ({"h": [torch.zeros(3, 2), torch.zeros(5, 2)]}, ["h[1]", "(4, 2)", "(5, 2)"]),
        ({"h": [torch.zeros(3, 2), torch.zeros(4, 2).half()]}, ["h[1]", "float16"]),
        ({"p": []}, ["p and q", "1 relations", "0"]),
        ({"q": [torch.zeros(2, 3)]}, ["q[0]", "(2, 2)", "(2, 3)"]),
        ({"impl": "fast"}, ["impl='fast'", "hmpnn_layer"]),
    ],
)
def test_misuse(change, words):
    plan = LayerPlan((3, 4), [(0, make_relation(3, 4, 5), 1)])
    square = torch.zeros(2, 2)
    given = {"h": [torch.zeros(3, 2), torch.zeros(4, 2)], "own": [square] * 2, "p": [square], "q": [square]}
    with pytest.raises(ValueError) as error:
        hmpnn_layer(**{**given, **change}, plan=plan)
    for word in words:
        assert word in str(error.value)


def test_tensors_and_relations_on_different_devices():
    with pytest.raises(ValueError, match="x is on cpu and the weight on meta: move one"):
        project(torch.zeros(3, 2), torch.zeros(4, 2, device="meta"))
    plan = LayerPlan((3, 4), [(0, make_relation(3, 4, 5), 1)])
    square = torch.zeros(2, 2, device="meta")
    h = [torch.zeros(n, 2, device="meta") for n in (3, 4)]
    with pytest.raises(ValueError, match="h is on meta and the plan's relations on cpu: move one"):
        hmpnn_layer(h, [square] * 2, [square], [square], plan, impl="reference")


def test_a_named_implementation_never_falls_back():
    plan = make_plan()
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*float64.*reference"):
        hmpnn_layer(*[[t.double() for t in tensors] for tensors in make(plan)], plan, impl="native")
    assert set(ops.implementations("hmpnn_layer")) == {"reference", "native", "cuda"}


@pytest.mark.usefixtures("poisoned", "two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (63, 65, 100), (40, 384, 128)], ids=str)
def test_project(shape, dtype):
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(inputs, rows).to(dtype).t().requires_grad_()  # columns stand together
    w, dy = torch.randn(outputs, inputs).to(dtype).requires_grad_(), torch.randn(rows, outputs).to(dtype)
    found = [project(x, w), *torch.autograd.grad(project(x, w), (x, w), dy)]
    plain = [torch.nn.functional.linear(x, w), *torch.autograd.grad(torch.nn.functional.linear(x, w), (x, w), dy)]
    exact_x, exact_w, exact_dy = x.double(), w.double(), dy.double()
    exact = [exact_x @ exact_w.t(), exact_dy @ exact_w, exact_dy.t() @ exact_x]
    for name, mine, peer, true in zip(("y", "dx", "dw"), found, plain, exact, strict=True):
        largest = float(true.detach().abs().max()) if true.numel() else 0.0
        budget = 4 * torch.finfo(dtype).eps * largest
        assert_within_budget(name, mine.detach(), peer.detach(), true.detach(), budget)


@pytest.mark.parametrize("need_x", [True, False])
def test_project_in_pytorchs_machinery(need_x):
    x, w = torch.randn(5, 4, requires_grad=need_x), torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.tlfast.project.default, (x, w))
    compiled = torch.compile(lambda x, w: torch.tanh(project(x, w)), fullgraph=True, backend="aot_eager")
    (mine,), (eager,) = (torch.autograd.grad(f(x, w).sum(), [w]) for f in (compiled, lambda x, w: project(x, w).tanh()))
    torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_states_that_lie_in_columns(impl):
    plan = make_plan()
    inputs, dh = make(plan), [torch.randn(n, 24) for n in NODES]
    wanted = run(lambda *a: hmpnn_layer(*a, impl=impl), inputs, plan, dh)

    def in_columns(h, *others):
        return hmpnn_layer([state.t().contiguous().t() for state in h], *others, impl=impl)

    for part, expected in zip(run(in_columns, inputs, plan, dh), wanted, strict=True):
        torch.testing.assert_close(part, expected)
