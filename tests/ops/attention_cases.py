"""What the tests of attention share: inputs, PyTorch's answer, what a forward keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.interpreter import interpreted
from tlfast import _native

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
LEAN = [pytest.param("native", marks=needs_native), "recompute"]
IMPLS = ["reference", *LEAN]
TRITON = pytest.param("triton", marks=interpreted)


def pairs(variants, impls):
    """Parameter sets (variant, implementation): all but those of a bias with triton, which takes none."""
    sets = [impl if isinstance(impl, type(TRITON)) else pytest.param(impl) for impl in impls]
    return [
        pytest.param(name, *impl.values, marks=impl.marks, id=f"{name}-{impl.values[0]}")
        for name, options in variants.items()
        for impl in sets
        if "bias" not in options or impl is not TRITON
    ]


def make(shape, bias=None, mask=False, causal=False, seed=0):
    """Inputs in float64: q, k, v, bias, key_mask, causal, and the output's gradient."""
    torch.manual_seed(seed)
    batch, queries, keys, heads, width = shape
    sizes = {"B": batch, "H": heads, "Sq": queries, "Sk": keys, "1": 1}
    q, dout = (torch.randn(batch, queries, heads, width, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(batch, keys, heads, width, dtype=torch.float64) for _ in range(2))
    bias = None if bias is None else torch.randn([sizes[s] for s in bias], dtype=torch.float64)
    key_mask = torch.rand(batch, keys) > 0.3 if mask else None
    return q, k, v, bias, key_mask, causal, dout


def pytorch(q, k, v, bias=None, key_mask=None, causal=False):
    """scaled_dot_product_attention, our layout and masks; a row without a key is not defined there: use none."""
    allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(
        k.shape[1] - q.shape[1] if causal else k.shape[1]
    )
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask if bias is None else mask + bias
    )
    return torch.where(allowed.any(-1, keepdim=True), out, 0).transpose(1, 2)


def run(function, case, dtype, **options):
    """Output and the gradients of q, k, v and bias (where there is one)."""
    q, k, v, bias, key_mask, causal, dout = case
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (q, k, v, bias)]
    out = function(*leaves[:3], bias=leaves[3], key_mask=key_mask, causal=causal, **options)
    wanted = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout.to(dtype))]


def rounded(case, dtype):
    """The case as it looks in a dtype, so that rounding the inputs is nobody's error."""
    return [x.to(dtype).double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case]


def kept(function, given):
    """Tensors that a forward saves, and the bytes of those storages that did not exist before."""
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    old = {x.untyped_storage().data_ptr() for x in given if x is not None}
    new = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in saved) if s.data_ptr() not in old}
    return saved, sum(new.values()), out
