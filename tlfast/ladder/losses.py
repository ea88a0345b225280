"""Losses, by transformers' conventions for labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backbone.lm_head import LMHead

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
IGNORED = -100


def problem_type(labels: torch.Tensor, num_labels: int, given: str | None) -> str:
    """transformers' rule: one output is regression; integer labels are classes; anything else is multi-label."""
    if given is not None:
        return given
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def sequence_loss(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> torch.Tensor:
    """Mean cross-entropy, binary cross-entropy or squared error, in float32: logits (B, C).

    labels: (B,) or (B, 1) classes; (B, C) floats of several labels or of a regression, for C = 1 also (B,).
    """
    logits = logits.float()
    expected = labels.shape[:1] if problem == "single_label_classification" else logits.shape
    if labels.numel() != expected.numel() or labels.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}; "
            f"pass {'(B,) classes' if problem == 'single_label_classification' else '(B, num_labels) numbers'}"
        )
    if problem == "regression":
        return F.mse_loss(logits.reshape(-1), labels.reshape(-1).float())
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.reshape(-1))


def language_loss(
    lm_head: LMHead | None, hidden: torch.Tensor, labels: torch.Tensor, num_items: int | torch.Tensor | None = None
) -> torch.Tensor:
    """What `token_loss` gives for the logits of a frozen head on hidden (B, S, D), without making them all at once."""
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} does not fit {hidden.shape[0]} sequences of {hidden.shape[1]} "
            f"tokens; pass one label a token, {tuple(hidden.shape[:-1])}"
        )
    assert lm_head is not None  # checked with the task
    if num_items is None:
        return lm_head.loss(hidden, labels, IGNORED)
    return lm_head.loss(hidden, labels, IGNORED, "sum") / num_items


def token_loss(logits: torch.Tensor, labels: torch.Tensor, num_items: int | torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy in float32 over the tokens whose label is not -100: logits (B, S, C), labels (B, S) int64.

    The mean, or the sum over num_items: how many labels all batches of one optimizer step have, which Trainer counts.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}; "
            f"pass one label a token, {tuple(logits.shape[:-1])}"
        )
    flat, targets = logits.float().flatten(0, -2), labels.reshape(-1)
    if num_items is None:
        return F.cross_entropy(flat, targets, ignore_index=IGNORED)
    return F.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum") / num_items


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """What each position is to predict: the label of the next one; the last has none."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def shifted_right(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Decoder inputs from target labels: the start token, then all labels but the last; -100 becomes padding."""
    inputs = F.pad(labels, (1, 0), value=start)[..., :-1]
    return inputs.masked_fill(inputs == IGNORED, pad)
