"""Domain adaptation, what KTN is compared with: losses that make source and target states alike."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

MOST_NODES = 1024  # of each side in a step, for losses over pairs of nodes or with a network of their own


class Side(NamedTuple):
    """Nodes of one type: states h (nodes, d) and the classifier's log-probabilities (nodes, classes)."""

    h: torch.Tensor
    log_probabilities: torch.Tensor

    def some(self, generator: torch.Generator) -> Side:
        """At most `MOST_NODES` of them, drawn."""
        count = self.h.shape[0]
        if count <= MOST_NODES:
            return self
        nodes = torch.randperm(count, generator=generator)[:MOST_NODES].to(self.h.device)
        return Side(self.h[nodes], self.log_probabilities[nodes])


class NoAdaptation(nn.Module):
    """Nothing is done about the other type: the source's classifier alone trains."""

    def forward(self, source: Side, target: Side, progress: float) -> torch.Tensor:
        """0."""
        return source.h.new_zeros(())


class Dan(nn.Module):
    """Squared maximum mean discrepancy between the states, under a sum of Gaussian kernels.

    Bandwidths are 1/4 to 4 times the mean squared distance, five of them with equal weights; all pairs of a draw of
    nodes count, a node with itself left out.
    Source: Long et al., "Learning Transferable Features with Deep Adaptation Networks" (DAN), ICML 2015, equation 1,
    with the unbiased estimate of Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 3.
    """

    def forward(self, source: Side, target: Side, progress: float) -> torch.Tensor:
        """The discrepancy, scalar; 0 in expectation where both sides are alike, so it may be a little below."""
        both = torch.cat([source.h, target.h]).float()
        squared = torch.cdist(both, both, compute_mode="use_mm_for_euclid_dist").square()
        width = squared.detach().mean().clamp(min=torch.finfo(squared.dtype).tiny)
        kernel = torch.stack([torch.exp(-squared / (width * 2.0**k)) for k in range(-2, 3)]).sum(0)
        n, m = source.h.shape[0], target.h.shape[0]
        return _off_diagonal(kernel[:n, :n]) + _off_diagonal(kernel[n:, n:]) - 2 * kernel[:n, n:].sum() / max(n * m, 1)


class Coral(nn.Module):
    """||C_S - C_T||^2 / (4 d^2), the covariances of the states.

    Source: Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", ECCV workshops 2016,
    equations 1 to 3.
    """

    def forward(self, source: Side, target: Side, progress: float) -> torch.Tensor:
        """The distance, scalar."""
        difference = _covariance(source.h.float()) - _covariance(target.h.float())
        return difference.square().sum() / (4 * source.h.shape[1] ** 2)


class Dann(nn.Module):
    """Cross-entropy of a network that tells the two types apart by their states, which get its gradient reversed.

    Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016, equations 9 and 10, with the
    reversal of section 4.2 growing as 2 / (1 + exp(-10 p)) - 1 over training (section 5.2.2).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.discriminator = _discriminator(self.inputs(dim, num_classes), dim)

    @staticmethod
    def inputs(dim: int, num_classes: int) -> int:
        """Width of what the network reads."""
        return dim

    @staticmethod
    def read(side: Side) -> torch.Tensor:
        """What the network reads, (nodes, inputs)."""
        return side.h

    def forward(self, source: Side, target: Side, progress: float) -> torch.Tensor:
        """The cross-entropy, both types with equal weight, scalar. progress: share of the training done, in [0, 1]."""
        strength = 2 / (1 + math.exp(-10 * progress)) - 1
        losses = []
        for side, label in ((source, 1.0), (target, 0.0)):
            logits = self.discriminator(_Reverse.apply(self.read(side), strength)).squeeze(1)
            losses.append(F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label)))
        return torch.stack(losses).mean()


class Cdan(Dann):
    """As `Dann`, but the network reads the outer product of state and predicted class probabilities.

    Source: Long et al., "Conditional Adversarial Domain Adaptation" (CDAN), NeurIPS 2018, equations 1 to 3 with the
    multilinear map T = f (x) g of section 3.2; without the entropy weights of CDAN+E.
    """

    @staticmethod
    def inputs(dim: int, num_classes: int) -> int:
        """Width of what the network reads."""
        return dim * num_classes

    @staticmethod
    def read(side: Side) -> torch.Tensor:
        """The outer product, flat; the probabilities are conditions, not to be moved, as in the authors' code."""
        probabilities = side.log_probabilities.detach().exp()
        return torch.einsum("nc,nd->ncd", probabilities, side.h).flatten(1)


ADAPTATIONS = ("none", "dan", "coral", "dann", "cdan")


def make_adaptation(name: str, dim: int, num_classes: int) -> nn.Module:
    """The module of one of `ADAPTATIONS`."""
    plain: dict[str, type[nn.Module]] = {"none": NoAdaptation, "dan": Dan, "coral": Coral}
    if name in plain:
        return plain[name]()
    return {"dann": Dann, "cdan": Cdan}[name](dim, num_classes)


class _Reverse(torch.autograd.Function):
    """x, whose gradient comes back times -strength."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * -ctx.strength, None


def _discriminator(inputs: int, hidden: int) -> nn.Module:
    """Its input is normalised: against states that have no bound, backbone and network could outgrow each other."""
    norm = nn.LayerNorm(inputs, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def _covariance(h: torch.Tensor) -> torch.Tensor:
    centred = h - h.mean(0)
    return centred.t() @ centred / max(h.shape[0] - 1, 1)


def _off_diagonal(kernel: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of two different nodes."""
    count = kernel.shape[0]
    return (kernel.sum() - kernel.diagonal().sum()) / max(count * (count - 1), 1)
