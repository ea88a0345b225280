"""A small residual network for pictures, trained in minutes on a CPU, and random views of pictures for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# RGB to luma and two chromas, in whose plane hue is an angle and saturation a radius
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = torch.linalg.inv(_YIQ)


class Conv(nn.Module):
    """A convolution without bias whose weight is a matrix, (out, kernel x kernel x in), as Muon takes it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride, self.inputs = kernel, stride, inputs
        bound = (inputs * kernel**2) ** -0.5
        self.weight = nn.Parameter(torch.empty(outputs, kernel**2 * inputs).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(-1, self.kernel, self.kernel, self.inputs).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, stride=self.stride, padding=self.kernel // 2)


class Block(nn.Module):
    """Two convolutions beside a shortcut; nothing but the shortcut at the start."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(Conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        last = nn.BatchNorm2d(outputs)
        self.second = nn.Sequential(Conv(outputs, outputs, 3), last)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), Conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x), inplace=True)


class ConvNet(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] -> (B, num_features) float32; bfloat16 inside where the CPU multiplies that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        stem = [Conv(3, width, 5, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        blocks = [Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)]
        self.layers = nn.Sequential(*stem, *blocks)
        self.in_bfloat16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = (2 * pixels - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16):
            x = self.layers(x)
        return x.float().mean(dim=(2, 3))


@dataclass(frozen=True)
class Views:
    """How much random views of a picture differ from it: standard deviations, and shares of views."""

    log_scale: float = 0.15
    log_aspect: float = 0.1
    degrees: float = 8.0
    shift: float = 0.12  # half widths
    hue: float = 0.125  # radians
    log_saturation: float = 0.15
    log_contrast: float = 0.1
    brightness: float = 0.04
    grey: float = 0.05  # share
    background: float = 0.5  # share on a plain background of any colour, where a picture is transparent

    def draw(self, pictures: torch.Tensor, size: int) -> torch.Tensor:
        """(B, 4, H, W), premultiplied RGBA in [0, 1] -> (B, 3, size, size); half of them mirrored."""
        moved = _sample(pictures, self._moves(len(pictures)), size)
        return self._recolour(_on_background(moved, self._backgrounds(len(pictures))))

    def _moves(self, count: int) -> torch.Tensor:
        scale = torch.exp(self.log_scale * torch.randn(count))
        aspect = torch.exp(self.log_aspect * torch.randn(count))
        angle = math.radians(self.degrees) * torch.randn(count)
        mirror = 2.0 * torch.randint(0, 2, (count,)) - 1
        moves = torch.empty(count, 2, 3)
        moves[:, 0, 0], moves[:, 0, 1] = scale * aspect * angle.cos() * mirror, -scale * angle.sin()
        moves[:, 1, 0], moves[:, 1, 1] = scale * angle.sin() * mirror, scale / aspect * angle.cos()
        moves[:, :, 2] = self.shift * torch.randn(count, 2)
        return moves

    def _backgrounds(self, count: int) -> torch.Tensor:
        plain = torch.rand(count, 1, 1, 1) < self.background
        return torch.where(plain, torch.rand(count, 3, 1, 1), torch.ones(count, 3, 1, 1))

    def _recolour(self, pixels: torch.Tensor) -> torch.Tensor:
        count = len(pixels)
        hue = self.hue * torch.randn(count)
        saturation = torch.exp(self.log_saturation * torch.randn(count)) * (torch.rand(count) >= self.grey)
        turn = torch.zeros(count, 3, 3)
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
        turn[:, 2, 1] = saturation * hue.sin()
        turn[:, 1, 2] = -turn[:, 2, 1]
        change = _RGB @ turn @ _YIQ * torch.exp(self.log_contrast * torch.randn(count))[:, None, None]
        shifted = torch.einsum("bij,bjhw->bihw", change, pixels - 0.5) + 0.5
        return (shifted + self.brightness * torch.randn(count, 3, 1, 1)).clamp(0, 1)


def plain_view(pictures: torch.Tensor, size: int, zoom: float = 1.0, mirrored: bool = False) -> torch.Tensor:
    """(B, 4, H, W), premultiplied RGBA in [0, 1] -> (B, 3, size, size), on white."""
    move = torch.tensor([[-1.0 if mirrored else 1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]) / zoom
    return _on_background(_sample(pictures, move.expand(len(pictures), 2, 3), size), torch.ones(1, 3, 1, 1))


def _sample(pictures: torch.Tensor, moves: torch.Tensor, size: int) -> torch.Tensor:
    grid = F.affine_grid(moves, [len(pictures), 4, size, size], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="zeros", align_corners=False)


def _on_background(pictures: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    return pictures[:, :3] + colour * (1 - pictures[:, 3:])


def optimisers(trained: nn.Module, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions, AdamW for heads, norms and biases; only matrices decay.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; PyTorch's implementation.
    """
    convolutions = [module.weight for module in trained.modules() if isinstance(module, Conv)]
    hidden = set(map(id, convolutions))
    others = [parameter for parameter in trained.parameters() if id(parameter) not in hidden]
    groups = [
        {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(convolutions, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=0.3 * rate)]
