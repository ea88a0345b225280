"""Side blocks as one operation: the same numbers as their modules give, and a reason wherever they are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.budget import assert_within_budget
from tlfast import _native
from tlfast.backbone.parts import BlockSpec
from tlfast.ladder import fused
from tlfast.ladder.blocks import SideBlock

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
BERT = BlockSpec(width=24, heads=4, kv_heads=4, head_dim=6, hidden=40, hidden_dropout=0.2, attention_dropout=0.1)
NO_ARGUMENTS = {"bias": None, "rotation": None, "memory": None}


def trained(spec):
    torch.manual_seed(0)
    block = SideBlock(spec).train()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return block


def results(block, x, key_mask, dout, dtype=torch.float32):
    block = block.to(dtype)
    x = x.to(dtype).requires_grad_()
    torch.manual_seed(7)  # of the dropouts
    out = block(x, key_mask)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], dout.to(dtype))]


@needs_native
@pytest.mark.parametrize(
    "change", [{}, {"placement": "pre"}, {"activation": "gelu_new", "causal": True}, {"norm": "rms", "bias": False}]
)
def test_a_block_gives_what_its_modules_give(change, monkeypatch):
    block, x = trained(dataclasses.replace(BERT, **change)), torch.randn(3, 70, 24)
    key_mask = torch.arange(70) < torch.tensor([[70], [33], [1]])
    dout = torch.randn(3, 70, 24) * key_mask[..., None]  # a loss sees no padding
    assert fused.why_not(block, x, NO_ARGUMENTS) is None
    ours = results(block, x, key_mask, dout)
    monkeypatch.setattr(fused, "why_not", lambda *_: "this test")
    plain = results(block, x, key_mask, dout)
    exact = results(block, x, key_mask, dout, torch.float64)
    for index, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        if index == 0:
            assert (a[~key_mask] == 0).all()
            a, b, c = (t[key_mask] for t in (a, b, c))
        rounding = 4 * torch.finfo(torch.float32).eps * c.abs().max()
        assert_within_budget(str(index), a, b, c, rounding)


@needs_native
def test_each_reason_is_given(monkeypatch):
    x = torch.randn(2, 5, 24)
    for change, words in (
        ({"kv_heads": 2}, "share keys"),
        ({"qk_norm": True}, "normed"),
        ({"gated": True}, "gated"),
        ({"placement": "sandwich"}, "sandwich"),
        ({"cross": True}, "encoder"),
    ):
        assert words in fused.why_not(SideBlock(dataclasses.replace(BERT, **change)), x, NO_ARGUMENTS)
    block = SideBlock(BERT)
    assert fused.why_not(block, x, NO_ARGUMENTS) is None
    assert "bias" in fused.why_not(block, x, NO_ARGUMENTS | {"bias": x})
    assert "float64" in fused.why_not(block, x.double(), NO_ARGUMENTS)
    assert "weights" in fused.why_not(SideBlock(BERT).bfloat16(), x, NO_ARGUMENTS)
    assert "3 sequences" in fused.why_not(block, torch.randn(3, 513, 24), NO_ARGUMENTS)
    assert fused.why_not(block, torch.randn(4, 513, 24), NO_ARGUMENTS) is None
    monkeypatch.setitem(fused.MISSING, "native", "switched off")
    assert fused.why_not(block, x, NO_ARGUMENTS) == "switched off"
    monkeypatch.undo()
    with torch.autocast("cpu", torch.float16):
        assert "float16" in fused.why_not(block, x, NO_ARGUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.why_not(block, x, NO_ARGUMENTS) is None
        assert fused.why_not(block, x.bfloat16(), NO_ARGUMENTS) is None
    assert "bfloat16" in fused.why_not(block, x.bfloat16(), NO_ARGUMENTS)


@needs_native
@pytest.mark.parametrize("change", [{}, {"placement": "pre"}])
def test_under_autocast_a_block_errs_no_more_than_its_modules(change, monkeypatch):
    block, x = trained(dataclasses.replace(BERT, **change)), torch.randn(3, 70, 24)
    key_mask = torch.arange(70) < torch.tensor([[70], [33], [1]])
    dout = torch.randn(3, 70, 24) * key_mask[..., None]
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(block, x, key_mask, dout)
        assert fused.why_not(block, x, NO_ARGUMENTS) is None
        monkeypatch.setattr(fused, "why_not", lambda *_: "this test")
        plain = results(block, x, key_mask, dout)
    exact = results(block, x, key_mask, dout, torch.float64)
    for index, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        if index == 0:
            a, b, c = (t[key_mask] for t in (a, b, c))
        rounding = torch.finfo(torch.bfloat16).eps / 2 * c.abs().max()
        assert_within_budget(str(index), a, b.to(a.dtype), c, rounding)
    assert not torch.equal(ours[0], results(block, x, key_mask, dout)[0])  # that in float32


@needs_native
def test_a_block_compiles_into_one_graph():
    block, x = trained(BERT), torch.randn(2, 20, 24)
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    compiled = torch.compile(block, fullgraph=True)
    block.eval(), compiled.eval()
    assert torch.equal(block(x, key_mask), compiled(x, key_mask))
