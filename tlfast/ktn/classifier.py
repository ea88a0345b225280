"""The classifier of the source type, which transferred target states share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..data.errors import InputError


def label_distribution(y: torch.Tensor, num_classes: int | None) -> torch.Tensor:
    """Labels as rows that sum to 1, (nodes, classes) float32: of integers with one class, of weights normalised.

    Rows without a label (-1, or all 0) are 0.
    Raises InputError for a class beyond num_classes.
    """
    if y.is_floating_point():
        y = y.double()
        total = y.sum(1, keepdim=True)
        return torch.where(total > 0, y / total.clamp(min=torch.finfo(y.dtype).tiny), 0.0).to(torch.float32)
    if not y.numel():
        return torch.zeros(0, num_classes or 0)
    classes = int(y.max()) + 1 if num_classes is None else num_classes
    if int(y.max()) >= classes:
        raise InputError(f"labels: class {int(y.max())} is beyond the {classes} classes, 0 to {classes - 1}")
    rows = torch.zeros(y.shape[0], classes)
    labelled = (y >= 0).nonzero().flatten()
    rows[labelled, y[labelled].to(torch.int64)] = 1.0
    return rows


class Classifier(nn.Module):
    """log_softmax(h W^T), without bias.

    Args:
        dim: width of the states. num_classes: of the labels.

    Source: KTN's code: Kullback-Leibler divergence to the label distribution, summed over classes, averaged over nodes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, h: torch.Tensor, transform: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities, (nodes, classes) of h (nodes, dim).

        transform: (dim, dim) of `KnowledgeTransfer.matrix`; it joins the weights, so a transfer costs no product more.
        """
        weight = self.weight if transform is None else self.weight @ transform.t()
        return torch.log_softmax(F.linear(h.to(weight.dtype), weight), dim=-1)

    def loss(self, log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Divergence of the label distribution (nodes, classes) from the prediction, averaged over nodes."""
        return F.kl_div(log_probabilities, labels, reduction="batchmean")
