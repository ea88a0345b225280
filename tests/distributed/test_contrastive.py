"""Contrastive losses of a batch that is spread over two processes: value and gradients are those of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.contrastive.cases import make, make_labels
from tlfast.contrastive import UniCLLoss, clip_loss, siglip_loss, unicl_loss

ROWS, WIDTH = 22, 12
SHARES = {"equal": (11, 11), "uneven": (15, 7), "one": (21, 1)}
LABELS = make_labels("own", ROWS)  # repeated ones lie in both shares
NAMES = ("image", "text", "scale", "bias")


def loss_of(form: str, leaves: list[torch.Tensor], labels: torch.Tensor, group: Any, impl: str) -> torch.Tensor:
    image, text, scale, bias = leaves
    if form == "unicl":
        return unicl_loss(image, text, labels, scale, impl, group)
    if form == "clip":
        return clip_loss(image, text, scale, impl, group)
    return siglip_loss(image, text, scale, bias, impl, group)


def step(form: str, part: slice, group: Any, impl: str, dtype: torch.dtype) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and the gradients, of the rows in `part`."""
    image, text = make(ROWS, WIDTH)
    scale, bias = torch.tensor(20.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)
    leaves = [x.requires_grad_() for x in (image[part].to(dtype), text[part].to(dtype), scale, bias)]
    loss = loss_of(form, leaves, LABELS[part], group, impl)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.item(), {name: g.numpy() for name, g in zip(NAMES, found, strict=True) if g is not None}


def step_in_two(rank, form, share, impl, dtype):
    first = sum(SHARES[share][:rank])
    part = slice(first, first + SHARES[share][rank])
    return step(form, part, torch.distributed.group.WORLD, impl, dtype)


@pytest.mark.parametrize("dtype, impl", [(torch.float32, "auto"), (torch.float64, "recompute")], ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("form", ["unicl", "clip", "siglip"])
def test_two_processes_find_what_one_finds(two_processes, form, share, dtype, impl):
    expected, gradients = step(form, slice(None), None, impl, dtype)
    tolerance = 64 * torch.finfo(dtype).eps
    (one, ours), (other, others) = two_processes(step_in_two, form, share, impl, dtype)
    assert one == pytest.approx(expected, rel=tolerance) and other == pytest.approx(expected, rel=tolerance)
    for name, gradient in gradients.items():
        # DistributedDataParallel takes the mean of what the two find
        if name in ("image", "text"):
            found = np.concatenate([ours[name], others[name]]) / 2
        else:
            found = (ours[name] + others[name]) / 2
        assert np.linalg.norm(found - gradient) <= tolerance * np.linalg.norm(gradient), name


class Towers(nn.Module):
    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, WIDTH), nn.Linear(5, WIDTH)
        self.loss = UniCLLoss(group=group)

    def forward(self, images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.image(images), self.text(texts), labels)


def train(model: nn.Module, part: slice) -> tuple[list[float], dict[str, np.ndarray]]:
    torch.manual_seed(1)
    images, texts = torch.randn(ROWS, 6), torch.randn(ROWS, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(images[part], texts[part], LABELS[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def train_in_two(rank):
    model = DistributedDataParallel(Towers(torch.distributed.group.WORLD))
    return train(model, slice(15) if rank == 0 else slice(15, ROWS))


def test_training_under_ddp_is_that_of_one_process(two_processes):
    expected, weights = train(Towers(), slice(None))
    for losses, found in two_processes(train_in_two):
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, weight in weights.items():
            np.testing.assert_allclose(found[f"module.{name}"], weight, rtol=1e-4, atol=1e-6)


def refuse_widths(rank):
    image = torch.ones(3, 4 + rank)
    with pytest.raises(ValueError) as caught:
        clip_loss(image, image, 1.0, group=torch.distributed.group.WORLD)
    return str(caught.value)


def refuse_dtypes(rank):
    image = torch.ones(3, 4, dtype=torch.bfloat16 if rank else torch.float16)
    with pytest.raises(ValueError) as caught:
        clip_loss(image, image, 1.0, group=torch.distributed.group.WORLD)
    return str(caught.value)


def refuse_nan(rank):
    image = torch.ones(3, 4)
    image[1] = torch.nan if rank else 1.0
    with pytest.raises(ValueError) as caught:
        clip_loss(image, torch.ones(3, 4), 1.0, group=torch.distributed.group.WORLD)
    return str(caught.value)


def test_every_process_hears_what_is_wrong_in_one(two_processes):
    for message in two_processes(refuse_widths):
        assert "widths [4, 5]" in message
    for message in two_processes(refuse_dtypes):  # of one size, but not one dtype
        assert "dtypes torch.float16, torch.bfloat16" in message
    first, second = two_processes(refuse_nan)
    assert "another process" in first and "image has NaN or infinity in 1 of 3 rows" in second
