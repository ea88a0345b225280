"""The contrastive losses on a GPU: Triton against float64, memory that does not grow with B^2, and no waiting."""

from __future__ import annotations

import pytest
import torch

from tests.contrastive.cases import LABELS, make, make_labels, plain_siglip, plain_unicl, relative_error, results
from tlfast.contrastive import siglip_loss, unicl_loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

SHAPES = [(1, 16), (2, 100), (63, 512), (65, 100), (1000, 512), (5000, 768)]


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_float32_accuracy(rows, width, kind):
    labels = make_labels(kind, rows).cuda()
    inputs = (*make(rows, width, device="cuda"), torch.tensor(100.0, device="cuda"))
    exact = results(lambda u, v, s: plain_unicl(u, v, labels, s), inputs, torch.float64)
    found = results(lambda u, v, s: unicl_loss(u, v, labels, s, impl="triton"), inputs, torch.float32)
    for name, expected in exact.items():
        assert relative_error(found[name], expected) <= 2e-5, name


@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accuracy(dtype, rows, width):
    """The weights of a gradient are rounded once, as its numbers are."""
    labels = make_labels("mixed", rows).cuda()
    image, text = make(rows, width, dtype, "cuda")
    scale, bias = torch.tensor(20.0, device="cuda"), torch.tensor(-10.0, device="cuda")
    for ours, plain in (
        (lambda u, v: unicl_loss(u, v, labels, scale, impl="triton"), lambda u, v: plain_unicl(u, v, labels, scale)),
        (lambda u, v: siglip_loss(u, v, scale, bias, impl="triton"), lambda u, v: plain_siglip(u, v, scale, bias)),
    ):
        exact, found = results(plain, (image, text), torch.float64), results(ours, (image, text), dtype)
        assert relative_error(found["loss"], exact["loss"]) <= 2e-5
        for name in ("dimage", "dtext"):
            assert relative_error(found[name], exact[name]) <= 2 * torch.finfo(dtype).eps, name


def test_memory_is_that_of_a_part_of_the_map():
    rows, width = 65536, 512
    if torch.cuda.mem_get_info()[0] < 4 * 2**30:
        pytest.skip("needs 4 GiB of free GPU memory")
    image, text = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.0, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    siglip_loss(image, text, scale, torch.tensor(0.0, device="cuda"), impl="triton").backward()
    assert torch.cuda.max_memory_allocated() - before <= 2 * image.nbytes + 2**30


def test_nothing_waits_for_the_gpu():
    image, text = (x.requires_grad_() for x in make(300, 64, device="cuda"))
    labels, scale = make_labels("mixed", 300).cuda(), torch.tensor(20.0, device="cuda", requires_grad=True)
    unicl_loss(image, text, labels, scale, impl="triton").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        unicl_loss(image, text, labels, scale, impl="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
