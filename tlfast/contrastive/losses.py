"""UniCL's, CLIP's and SigLIP's losses of a batch of pairs, in one process or over all processes of a group."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import contrastive_sigmoid, contrastive_softmax
from . import checks
from .labels import group_by_label, group_means, group_sizes
from .sharing import Batch

Scale = torch.Tensor | float


def unicl_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: Scale,
    impl: str = "auto",
    group: Any = None,
) -> torch.Tensor:
    """Cross-entropy of scores tau u_i . v_j against all pairs of equal labels, averaged over both directions.

    Targets are T_ij = 1 / n(y_i) where y_i = y_j, n(y) being how many of the batch have the label. The mean of a row's
    positive scores is tau u_i . mean(v of the label), so positives cost O(B D), and the B x B part knows no labels.

    Args:
        image, text: embeddings (B, D), pair i in row i, float32, bfloat16 or float16 (float64: impl "reference" or
            "recompute"); used as they are, so normalise them. Where dtypes differ the narrower is widened.
        labels: (B,) int64; -1: a label of its own, as of a caption.
        logit_scale: tau, a number or a tensor of one element, not negative; dimensionless (CLIP: up to 100).
        impl: as for `tlfast.ops.contrastive_softmax`.
        group: None, or a process group (`torch.distributed.group.WORLD`) over whose processes the batch is spread; they
            may hold different numbers of pairs. Each process scores its images against all texts and none twice.

    Returns:
        The loss, a float32 scalar (float64 for float64). With a group it is that of the whole batch in each process,
        and gradients are such that their mean over processes, which DistributedDataParallel takes, is the whole
        batch's. In the products' memory, beyond inputs and gradients, O(B D) with labels and O(B) without.

    Raises:
        ValueError: shapes, dtypes, devices, labels or logit_scale that do not fit, or NaN or infinity in embeddings.
            What is on a GPU is not looked at, which would wait for it: a NaN there is a NaN in the loss.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022 (arXiv 2204.03610),
    equations 2-4.
    """
    image, text = checks.embeddings(image, text)
    checks.labels(labels, image)
    batch = Batch(image, text, group)
    groups = group_by_label(batch.gather_labels(labels))
    sizes = group_sizes(groups)
    softmax = _softmax_sum(batch, logit_scale, impl, batch.own(sizes == 1))
    # the sum over the images; that over the texts, v_j . mean(u of the label), is the same
    positives = (image.to(softmax.dtype) * batch.own(group_means(batch.texts, groups, sizes))).sum()
    return _finish(batch, softmax - _scalar(logit_scale, softmax) * positives)


def clip_loss(
    image: torch.Tensor, text: torch.Tensor, logit_scale: Scale, impl: str = "auto", group: Any = None
) -> torch.Tensor:
    """Cross-entropy of each image's own text among all texts and of each text's own image, averaged.

    Arguments, result and errors as of `unicl_loss`, of which it is the case that no two labels are equal.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021 (arXiv
    2103.00020), figure 3.
    """
    image, text = checks.embeddings(image, text)
    batch = Batch(image, text, group)
    return _finish(batch, _softmax_sum(batch, logit_scale, impl))


def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: Scale,
    logit_bias: Scale,
    impl: str = "auto",
    group: Any = None,
) -> torch.Tensor:
    """-sum_ij log sigmoid(z_ij (tau u_i . v_j + b)) / B, z_ij = 1 for a pair and -1 for all others.

    Arguments, result and errors as of `unicl_loss`; logit_bias is b, a number or a tensor of one element.

    Source: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training", ICCV 2023 (arXiv
    2303.15343), algorithm 1.
    """
    image, text = checks.embeddings(image, text)
    batch = Batch(image, text, group)
    others, own = contrastive_sigmoid(image, batch.texts, logit_scale, logit_bias, batch.first, impl)
    return _finish(batch, others.sum() + _softplus(-own - _scalar(logit_bias, own)).sum())


def _softmax_sum(batch: Batch, logit_scale: Scale, impl: str, alone: torch.Tensor | None = None) -> torch.Tensor:
    """Half the sum over this process's pairs and both directions of log-sum-exp minus own score, or of log-sum-exp.

    alone: (N,) bool, the pairs whose own score is their only positive one, None for all; of the others nothing is
    subtracted. Own scores are taken off here because the loss of such a pair can be near 0, where a difference of two
    rounded numbers has no digits left; where a label repeats it is at least log 2.
    """
    rows, columns, own = contrastive_softmax(batch.images, batch.texts, logit_scale, batch.first, impl)
    total = own.new_zeros(())
    for others in (rows, batch.combine_columns(columns)):
        entropy = _softplus(others - own)
        if alone is not None:
            entropy = torch.where(alone, entropy, torch.logaddexp(others, own))
        total = total + entropy.sum()
    return total / 2


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), right to the last digits for large negative x, too, and 0 for -inf."""
    return torch.logaddexp(x.new_zeros(()), x)


def _scalar(number: Scale, like: torch.Tensor) -> Scale:
    """A tensor of one element without dimensions: one on the CPU then also goes with what is on a GPU."""
    return number.reshape(()).to(like.dtype) if isinstance(number, torch.Tensor) else number


def _finish(batch: Batch, total: torch.Tensor) -> torch.Tensor:
    loss = batch.mean(total)
    checks.finite(loss, batch.images, batch.own(batch.texts), batch.group is not None)
    return loss
