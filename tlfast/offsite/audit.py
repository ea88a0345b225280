"""What of a model leaves the house with a bundle: for every tensor, the nearest one of the full model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.errors import InputError
from .architecture import base_of, blocks_path, tensors_of
from .bundle import Bundle
from .making import block_of, full_name
from .seal import is_sealed, seal_key

AS_GOOD = 0.99  # from this cosine on a tensor is as good as the original: int8 has 0.9999, nf4 0.995


@dataclass(frozen=True)
class Finding:
    """One tensor of a bundle. part: "first", "middle", "last", or "rest" outside of the blocks.

    block: in the full model, the one it stands for; None outside of the blocks. nearest: the tensor of the full model
    with the largest cosine among those of its shape, "" where there is none of its shape. cosine: with it, in float64.
    originals: how many numbers of the nearest are not zero. equal: how many of its own, zeros left out, are those of
    the nearest, to the bit. of_middle: whether the nearest is in the full model's middle.
    """

    name: str
    part: str
    block: int | None
    shape: tuple[int, ...]
    nearest: str
    cosine: float
    originals: int
    equal: int
    of_middle: bool

    @property
    def revealed(self) -> int:
        """How many numbers of the original it gives away: those equal, or all where it is as good; no zeros."""
        return self.originals if self.cosine >= AS_GOOD else self.equal


@dataclass(frozen=True)
class Audit:
    """findings: of every tensor. numbers, matrix_numbers: of the full model's middle, all and in matrices; no zeros.

    Shares leave zeros out above and below the line: pruned channels are zeros in many a model, and tell nothing. Of a
    middle that is nothing but zeros they are 0.
    """

    recipe: str
    findings: tuple[Finding, ...]
    numbers: int
    matrix_numbers: int

    @property
    def verbatim(self) -> float:
        """Which share of the full middle's numbers is in the bundle to the bit."""
        return sum(found.equal for found in self.given_away) / max(1, self.numbers)

    @property
    def verbatim_matrices(self) -> float:
        """The same of its matrices alone: norms and biases are few, and most emulators have them as they were."""
        return sum(found.equal for found in self.given_away if len(found.shape) > 1) / max(1, self.matrix_numbers)

    @property
    def revealed_matrices(self) -> float:
        """Which share of its matrices is in the bundle to the bit, or as good: with a cosine of at least 0.99."""
        return sum(found.revealed for found in self.given_away if len(found.shape) > 1) / max(1, self.matrix_numbers)

    @property
    def given_away(self) -> list[Finding]:
        """Of each original tensor of the middle that is the nearest of one, what gives away most of it."""
        best: dict[str, Finding] = {}
        for found in self.findings:
            if found.of_middle and (found.nearest not in best or found.revealed > best[found.nearest].revealed):
                best[found.nearest] = found
        return list(best.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        shares = {name: getattr(self, name) for name in ("verbatim", "verbatim_matrices", "revealed_matrices")}
        return {"recipe": self.recipe, **shares, "tensors": [asdict(found) for found in self.findings]}


@torch.no_grad()
def audit(bundle: Bundle, model: Any, secret: bytes = b"") -> Audit:
    """Compare every tensor of a bundle with every tensor of its shape in the full model it was made of.

    Raises InputError where the bundle was made of another model. What distances cannot show is what one may learn by
    training on the emulator's outputs; no figure here is a proof that something stays hidden.
    """
    if not is_sealed(bundle.manifest, seal_key(model, secret)):
        raise InputError("the bundle was not made of this model, or with another secret; pass the model it came from")
    path, own = blocks_path(model), tensors_of(model)
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, tensor in own.items():
        by_shape[tuple(tensor.shape)].append(name)
    middle = [tensor for name, tensor in own.items() if _is_middle(block_of(name, path), bundle)]
    findings = tuple(
        _finding(name, tensor, by_shape, own, path, bundle) for name, tensor in tensors_of(bundle.model).items()
    )
    matrices = sum(_nonzero(tensor) for tensor in middle if tensor.dim() > 1)
    recipe = bundle.manifest["emulator"]["recipe"]
    return Audit(recipe, findings, sum(map(_nonzero, middle)), matrices)


def fidelity(bundle: Bundle, model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The emulator's own quality before anyone tunes it, beside the full model's.

    batches: of the model's inputs. Of a language model the perplexity of both, over tokens that are no padding; of all
    models the mean cosine of the last hidden states with the full model's.
    """
    cosines: list[torch.Tensor] = []
    losses: dict[str, list[tuple[float, int]]] = defaultdict(list)
    models: dict[str, Any] = {"model": model, "emulator": bundle.model}
    for batch in batches:
        states = {}
        mask = batch.get("attention_mask")
        for name, either in models.items():
            with torch.no_grad():
                states[name] = base_of(either)(**batch)[0]
                if either.can_generate():
                    ids = batch["input_ids"]
                    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
                    losses[name].append(
                        (either(**batch, labels=labels).loss.item(), int((labels[:, 1:] != -100).sum()))
                    )
        cosine = torch.nn.functional.cosine_similarity(states["model"], states["emulator"], dim=-1)
        cosines.append(cosine if mask is None else cosine[mask.bool()])
    found = {"hidden_cosine": float(torch.cat([cosine.flatten() for cosine in cosines]).mean())}
    for name, values in losses.items():
        total = sum(count for _, count in values)
        mean = sum(loss * count for loss, count in values) / total
        found[f"{name}_perplexity"] = float(torch.tensor(mean, dtype=torch.float64).exp())
    return found


def _is_middle(block: int | None, bundle: Bundle) -> bool:
    first, last = bundle.blocks.adapter
    return block is not None and first <= block < bundle.blocks.total - last


def _finding(
    name: str,
    tensor: torch.Tensor,
    by_shape: Mapping[tuple[int, ...], Sequence[str]],
    own: Mapping[str, torch.Tensor],
    path: str,
    bundle: Bundle,
) -> Finding:
    place = block_of(name, path)
    block = None if place is None else bundle.blocks.kept[place]
    role = None if place is None else bundle.blocks.role(place, len(bundle.blocks.kept))
    part = "rest" if block is None else "middle" if role is None else role.partition(".")[0]
    candidates = by_shape.get(tuple(tensor.shape), ())
    flat = tensor.detach().reshape(-1)
    origin = full_name(name, path, bundle.blocks)  # among equals, such as norms of ones, it comes from there
    scored = [(_cosine(flat, own[other].detach().reshape(-1)), other == origin, other) for other in candidates]
    cosine, _, nearest = max(scored, default=(0.0, False, ""))
    equal = int(((flat == own[nearest].detach().reshape(-1)) & (flat != 0)).sum()) if nearest else 0
    of_middle = part == "middle" and _is_middle(block_of(nearest, path), bundle)
    originals = _nonzero(own[nearest]) if nearest else 0
    return Finding(name, part, block, tuple(tensor.shape), nearest, cosine, originals, equal, of_middle)


def _nonzero(tensor: torch.Tensor) -> int:
    return int(tensor.count_nonzero())


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of equal tensors 1, also of zeros."""
    if torch.equal(a, b):
        return 1.0
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(torch.finfo(torch.float64).tiny))
