"""The linear probe: the least one can do with a frozen backbone, and what every other method must beat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..backbone import FrozenBackbone
from ..ladder.heads import pool
from ..training import TaskData, predict_logits

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # inverse regularisation, the C of scikit-learn


class LinearProbe(nn.Module):
    """logits = W e + b, where e (B, D) is the mean of the frozen backbone's last hidden state over the tokens.

    Until it is given a classifier the logits are e itself. forward takes transformers' inputs and labels (B,).
    """

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.backbone = backbone.with_taps(())
        self.classifier: nn.Module = nn.Identity()

    def forward(
        self, attention_mask: torch.Tensor, labels: torch.Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """transformers' inputs, (B, S) each. Returns loss and logits."""
        hidden = self.backbone(attention_mask=attention_mask, **inputs).last_hidden_state
        logits = self.classifier(pool(hidden, attention_mask.bool(), "mean"))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def fit_probe(backbone: FrozenBackbone, data: TaskData) -> LinearProbe:
    """Fit the classifier by multinomial logistic regression; dev chooses the regularisation, of equals the strongest.

    data: a task with classes.
    """
    probe = LinearProbe(backbone)
    train, dev = (predict_logits(probe, dataset, data.collate) for dataset in (data.train, data.dev))
    chosen, highest = None, -1.0
    for strength in STRENGTHS:
        regression = LogisticRegression(C=strength, max_iter=2000).fit(train, data.train.labels)
        classifier = _as_linear(regression)
        logits = classifier(torch.from_numpy(dev)).detach().numpy()
        accuracy = data.scoring.score(logits, data.dev.labels)["accuracy"] or 0.0
        if accuracy > highest:
            chosen, highest = classifier, accuracy
    assert chosen is not None  # any accuracy is above -1
    probe.classifier = chosen
    return probe


def _as_linear(regression: LogisticRegression) -> nn.Linear:
    """The fitted weights as a torch layer; two classes have one row in scikit-learn."""
    weight, bias = np.atleast_2d(regression.coef_), np.atleast_1d(regression.intercept_)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    return linear
