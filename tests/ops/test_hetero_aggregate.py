"""hetero_aggregate: sums and gradients within PyTorch's own error of float64; awkward graphs, PyTorch's machinery."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tests.conftest import ROOT
from tests.ops.graph_cases import SIZES, make_edges, make_relation, plain_mean
from tests.ops.norm_cases import needs_native
from tlfast import ops
from tlfast.ops import Relation, RelationGroup, hetero_aggregate
from tlfast.ops.hetero_aggregate.api import both_ways
from tlfast.ops.hetero_aggregate.relation import HUB, SLICES, make_tasks

IMPLS = ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float32, torch.bfloat16]


def check(sources, targets, count, width, dtype, impl, reduce="mean", seed=0):
    edges = make_edges(sources, targets, count, seed)
    relation = Relation.from_edges(edges, sources, targets)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sources, width, generator=draw).to(dtype)
    dy = torch.randn(targets, width, generator=draw).to(dtype)

    def run(function, as_dtype):
        leaf = x.to(as_dtype).requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(as_dtype))[0]

    ours = run(lambda leaf: hetero_aggregate(leaf, relation, reduce, impl=impl), dtype)
    peer = run(lambda leaf: plain_mean(leaf, edges, targets, reduce), dtype)
    exact = run(lambda leaf: plain_mean(leaf, edges, targets, reduce), torch.float64)
    # terms are taken in another order than PyTorch's: a rounding of the largest sum on the way is a matter of luck
    sizes = plain_mean(x.abs().double(), edges, targets, reduce)
    rounding = 2 * torch.finfo(torch.float32).eps * max(float(sizes.max()), float(exact[1].detach().abs().max()))
    for name, mine, plain, truth in zip(("y", "dx"), ours, peer, exact, strict=True):
        assert_within_budget(name, mine, plain, truth, rounding)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("width", [1, 100, 128])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_accuracy(impl, dtype, size, width, reduce):
    check(*size, width, dtype, impl, reduce)


@needs_native
@pytest.mark.usefixtures("poisoned", "two_threads")
@given(
    sources=st.integers(1, 80), targets=st.integers(1, 80), edges=st.integers(0, 500), width=st.integers(1, 150),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_native_on_any_graph(sources, targets, edges, width, seed):
    check(sources, targets, edges, width, torch.float32, "native", seed=seed)


@pytest.mark.usefixtures("poisoned", "two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_many_relations_with_base(impl, relu, dtype):
    relations = [make_relation(s, 50, e, seed=s) for s, e in ((30, 200), (7, 0), (90, 700))]
    group = RelationGroup(relations)
    leaves = [torch.randn(r.num_sources, 40).to(dtype).requires_grad_() for r in relations]
    base, dy = torch.randn(50, 40).to(dtype).requires_grad_(), torch.randn(50, 40).to(dtype)

    def formula(tensors, at):
        parts = [plain_mean(t.to(at), r.edge_index(), 50) for t, r in zip(tensors[1:], relations, strict=True)]
        y = tensors[0].to(at) + sum(parts)
        return torch.relu(y) if relu else y

    tensors = [base, *leaves]
    y = hetero_aggregate(leaves, group, base=base, relu=relu, impl=impl)
    assert torch.equal(y, hetero_aggregate(leaves, relations, base=base, relu=relu, impl=impl))
    assert_within_budget("y", y, formula(tensors, dtype), formula(tensors, torch.float64))
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    plain, exact = formula(tensors, dtype), formula(doubles, torch.float64)
    # signs of results that are 0 to rounding may differ, and with them what flows back
    flows = (exact.abs() > 0.05).to(dtype)
    results = zip(
        torch.autograd.grad(y, tensors, dy * flows),
        torch.autograd.grad(plain, tensors, dy * flows),
        torch.autograd.grad(exact, doubles, (dy * flows).double()),
        strict=True,
    )
    for i, (ours, peer, truth) in enumerate(results):
        assert_within_budget(f"gradient {i}", ours, peer, truth, 1e-6)


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [5, 64, 200])
def test_hubs_are_shared_out(width):
    """Rows far beyond HUB edges are cut into slices of columns; the sum is the same."""
    edges = torch.stack([torch.arange(3 * HUB) % 97, torch.zeros(3 * HUB, dtype=torch.int64)])
    edges[1, ::5] = 2
    relation = Relation.from_edges(edges, 97, 4)
    assert (relation.by_target.tasks[:, 2] >= 0).sum() == SLICES
    x = torch.randn(97, width)
    ours, exact = hetero_aggregate(x, relation, impl="native"), plain_mean(x.double(), edges, 4)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@given(degree=st.lists(st.sampled_from([0, 1, 3, 200, 2000, HUB, HUB + 1]), max_size=40))
def test_tasks_cover_every_row_once(degree):
    tasks = make_tasks([torch.tensor(degree, dtype=torch.int64)]).tolist()
    covered = [row for first, end, piece in tasks for row in range(first, end) if piece <= 0]
    assert covered == list(range(len(degree)))
    assert [first for first, _, piece in tasks if piece >= 0] == [
        row for row, d in enumerate(degree) if d > HUB for _ in range(SLICES)
    ]


def test_duplicate_edges_count_twice():
    relation = Relation.from_edges(torch.tensor([[0, 0, 1], [0, 0, 0]]), 2, 2)
    y = hetero_aggregate(torch.tensor([[3.0], [6.0]]), relation)
    assert y.tolist() == [[4.0], [0.0]]
    assert relation.edge_index().tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_reaches_its_neighbours_alone(impl):
    relation = Relation.from_edges(torch.tensor([[0, 1, 2], [0, 1, 1]]), 3, 3)
    x = torch.ones(3, 20)
    x[0, 3] = torch.nan
    y = hetero_aggregate(x, relation, relu=True, impl=impl)
    assert y[0, 3].isnan() and torch.equal(y[1], torch.ones(20)) and torch.equal(y[2], torch.zeros(20))
    assert y.isnan().sum() == 1


@needs_native
@pytest.mark.usefixtures("poisoned")
def test_strided_rows():
    relation = make_relation(40, 30, 300)
    wide = torch.randn(40, 150)
    for view in (wide[:, 30:100], wide[:, ::2], torch.randn(70, 40).t(), torch.randn(1, 70).expand(40, 70)):
        assert torch.equal(
            hetero_aggregate(view, relation, impl="native"),
            hetero_aggregate(view.contiguous(), relation, impl="native"),
        )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    relation, before, found = make_relation(500, 400, 9000), torch.get_num_threads(), []
    x = torch.randn(500, 96).to(dtype)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(hetero_aggregate(x, relation, impl="native"))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_instruction_set_agrees(isa, fresh_process):
    code = (
        "import torch, tlfast\n"
        "torch.manual_seed(0)\n"
        "edges = torch.randint(60, (2, 500))\n"
        "relation = tlfast.ops.Relation.from_edges(edges, 60, 60)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x = torch.randn(60, 77).to(dtype)\n"
        "    y = tlfast.ops.hetero_aggregate(x, relation, impl='native').double()\n"
        "    exact = tlfast.ops.hetero_aggregate(x.double(), relation)\n"
        "    print(bool(((y - exact).abs() <= torch.finfo(dtype).eps * (1 + exact.abs())).all()))\n"
    )
    assert fresh_process(code, TLFAST_CPU_ISA=isa) == "True\nTrue"


@needs_native
def test_nothing_of_edges_times_width_is_allocated():
    relation = make_relation(50, 60, 5000)
    x = torch.randn(50, 128, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        hetero_aggregate(x, relation, impl="native").sum().backward()
    largest = max(event.self_cpu_memory_usage for event in trace.events())
    assert largest <= 60 * 128 * 4 < 5000 * 128


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradcheck(reduce):
    relation, other = make_relation(6, 5, 20), make_relation(4, 5, 9, seed=1)
    x, z = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 4))
    base = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x, z, base):
        return hetero_aggregate([x, z], [relation, other], reduce, base, relu=True)

    assert torch.autograd.gradcheck(run, (x, z, base))
    assert torch.autograd.gradgradcheck(run, (x, z, base))


@needs_native
@pytest.mark.parametrize("relu", [False, True])
def test_opcheck(relu):
    relation = make_relation(6, 5, 20)
    rowptr, col, scale = both_ways(relation, "mean")[:3]
    weights = torch.rand(6)
    arguments = ([torch.randn(6, 8)], [rowptr], [col], [scale], [weights], relation.by_target.tasks)
    for base in (None, torch.randn(5, 8)):
        torch.library.opcheck(torch.ops.tlfast.hetero_aggregate.default, (*arguments, base, relu, "native"))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_into_one_graph(impl):
    relation = make_relation(6, 5, 20)

    def step(x):
        return torch.tanh(hetero_aggregate(x * 2, relation, relu=True, impl=impl))

    x = torch.randn(6, 8, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, step(x))
    ours, eager = (torch.autograd.grad(y.sum(), x)[0] for y in (compiled, step(x)))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(4, 2)}, ["x", "(3, D)", "(4, 2)"]),
        ({"x": torch.zeros(3, 2).long()}, ["x", "int64", "float32"]),
        ({"x": [torch.zeros(3, 2)] * 2}, ["x", "1 relations", "2"]),
        ({"x": torch.zeros(3, 2, device="meta")}, ["x", "meta", "cpu"]),
        ({"reduce": "max"}, ["reduce", "mean", "sum", "max"]),
        ({"base": torch.zeros(2, 3)}, ["base", "(2, 2)", "(2, 3)"]),
        ({"base": torch.zeros(2, 2).double()}, ["base", "float32", "float64"]),
        ({"relation": []}, ["relations", "at least one"]),
        ({"impl": "fast"}, ["impl='fast'", "hetero_aggregate", "native"]),
    ],
)
def test_misuse(change, words):
    given = {"x": torch.zeros(3, 2), "relation": Relation.from_edges(torch.tensor([[0], [1]]), 3, 2)}
    with pytest.raises(ValueError) as error:
        hetero_aggregate(**{**given, **change})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "edges, words",
    [
        (torch.tensor([[0, 3], [0, 1]]), ["source node 3", "3 nodes", "0 to 2"]),
        (torch.tensor([[0, 1], [0, -1]]), ["target node -1", "2 nodes"]),
        (torch.tensor([[0, 1], [0, 2]]), ["target node 2"]),
        (torch.zeros(2, 3), ["integers", "float32"]),
        (torch.zeros(3, 2).long(), ["(2, E)", "(3, 2)"]),
        (torch.zeros(2, 3, dtype=torch.uint32), ["integers", "int64 or narrower", "uint32"]),
        (torch.zeros(2, 3, dtype=torch.complex64), ["integers", "complex64"]),
        ([[0], [0]], ["tensor", "list"]),
    ],
)
def test_bad_edges(edges, words):
    with pytest.raises(ValueError) as error:
        Relation.from_edges(edges, 3, 2, name="edges of x")
    for word in ["edges of x", *words]:
        assert word in str(error.value)


def test_a_named_implementation_never_falls_back():
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*float64.*reference"):
        hetero_aggregate(torch.zeros(1, 2).double(), make_relation(1, 1, 1), impl="native")
    assert set(ops.implementations("hetero_aggregate")) == {"reference", "native", "cuda"}


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_cuda_kernel_compiles(architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    source = ROOT / "csrc" / "ops" / "cuda" / "hetero_aggregate.cu"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'common'}"]
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-DTLFAST_WITH_CUDA", f"-arch=sm_{architecture}"]
    command = ["nvcc", *flags, *includes, "-Xptxas", "-v", "-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert " 0 bytes spill stores" in done.stderr
    assert not [line for line in done.stderr.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [5, 64, 128, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype, width):
    edges = torch.stack([torch.arange(3 * HUB) % 97, torch.arange(3 * HUB) % 5 // 4])
    for relation in (make_relation(300, 200, 3000), Relation.from_edges(edges, 97, 4)):
        x = torch.randn(relation.num_sources, width).to(dtype)
        exact = hetero_aggregate(x.double(), relation)
        ours, peer = hetero_aggregate(x.cuda(), relation.to("cuda"), impl="cuda").cpu(), hetero_aggregate(x, relation)
        assert_within_budget("y", ours, peer, exact, torch.finfo(torch.float32).eps * float(exact.abs().max()))


@needs_native
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_counting_and_sorting_give_the_same_rows(size, monkeypatch):
    counted = make_relation(*size)
    monkeypatch.setattr("tlfast._native.why_not", lambda: "blocked")
    compressed = make_relation(*size)
    for mine, expected in ((counted.by_target, compressed.by_target), (counted.by_source, compressed.by_source)):
        assert mine.columns == expected.columns
        for name in ("rowptr", "col", "inverse_degree", "tasks"):
            a, b = getattr(mine, name), getattr(expected, name)
            assert torch.equal(a, b) and a.dtype == b.dtype, name
