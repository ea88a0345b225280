"""What a contrastive loss asks of its inputs; errors say which, what was given and what to do."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def embeddings(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one dtype, the wider one."""
    for name, x in (("image", image), ("text", text)):
        if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
            given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a floating-point tensor of embeddings, of 16 bits or more, not {given}")
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(f"{name} must be (B, D) with at least one row and one column, not {tuple(x.shape)}")
    if text.shape != image.shape:
        raise ValueError(f"text must be {tuple(image.shape)} as image is, a row for each pair, not {tuple(text.shape)}")
    if text.device != image.device:
        raise ValueError(f"text is on {text.device} and image on {image.device}: move them to one device")
    dtype = torch.promote_types(image.dtype, text.dtype)
    return image.to(dtype), text.to(dtype)


def labels(labels: torch.Tensor, image: torch.Tensor) -> None:
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        given = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"labels must be an int64 tensor, not {given}: use labels.long() or torch.tensor(labels)")
    if labels.shape != image.shape[:1]:
        raise ValueError(
            f"labels must be {tuple(image.shape[:1])} as image is {tuple(image.shape)}, not {tuple(labels.shape)}"
        )
    if labels.device != image.device:
        raise ValueError(f"labels are on {labels.device} and image on {image.device}: move them to one device")
    if _readable(labels) and int(labels.min()) < -1:
        raise ValueError(f"labels must be 0 or more, or -1 for a label of its own, not {int(labels.min())}")


def finite(loss: torch.Tensor, image: torch.Tensor, text: torch.Tensor, shared: bool) -> None:
    """Look for the reason where the loss is not finite; costs nothing where it is. shared: with other processes."""
    if not _readable(loss) or bool(loss.detach().isfinite()):
        return
    for name, x in (("image", image), ("text", text)):
        bad = (~x.detach().isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(x)} rows, the first {bad[0]}")
    if shared:
        raise ValueError(
            f"the loss is {float(loss.detach())}: image or text has NaN or infinity in another process, which says "
            "where, or the scores are too large for their dtype"
        )


def _readable(x: torch.Tensor) -> bool:
    """Whether reading a value neither waits for a GPU nor breaks a graph that is being compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
