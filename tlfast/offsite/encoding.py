"""How a weight matrix of an emulator's middle is stored: as it is, as two thin factors, or in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ops.frozen_linear.formats import GROUP, int8_of, nf4_of, nf4_value
from .reading import Layout

KINDS = ("low-rank", "int8", "nf4")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """A matrix (N, K) in parts. kind: one of KINDS. rank: of its factors; 0 for other kinds. columns: K.

    "low-rank": left (N, R) and right (R, K) float32. "int8": values int8 (N, K), scale float32 (N,). "nf4": codes uint8
    (N, K/2), two to a byte, groups uint8 (N, K/64), scale float32 (N,); K/2 and K/64 rounded up.
    """

    kind: str
    rank: int
    columns: int
    parts: Mapping[str, torch.Tensor]

    def value(self) -> torch.Tensor:
        """The matrix that the parts stand for, (N, K) float32."""
        parts = self.parts
        if self.kind == "low-rank":
            return parts["left"] @ parts["right"]
        if self.kind == "int8":
            return parts["values"].float() * parts["scale"][:, None]
        codes = torch.stack((parts["codes"] & 15, parts["codes"] >> 4), dim=-1).flatten(1)
        return nf4_value(codes[:, : self.columns], parts["groups"], parts["scale"])

    def described(self) -> dict[str, str | int]:
        """As a manifest keeps it."""
        return {"kind": self.kind, "rank": self.rank}


def encode(kind: str, weight: torch.Tensor, rank: int = 0) -> Encoded:
    """Store a float32 matrix (N, K). rank: for "low-rank", below N and K.

    Source of the factors: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    weight = weight.detach()
    if kind == "low-rank":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:rank].sqrt()
        parts = {"left": (left[:, :rank] * root).contiguous(), "right": (root[:, None] * right[:rank]).contiguous()}
        return Encoded(kind, rank, weight.shape[1], parts)
    if kind == "int8":
        values, scale = int8_of(weight)
        return Encoded(kind, 0, weight.shape[1], {"values": values, "scale": scale})
    codes, groups, scale = nf4_of(weight)
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    parts = {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "groups": groups, "scale": scale}
    return Encoded(kind, 0, weight.shape[1], parts)


def expected_parts(kind: str, rank: int, shape: Shape) -> Layout:
    """Dtypes and shapes of the parts of a matrix; ValueError where they are none."""
    rows, columns = shape
    if kind == "low-rank":
        if not 1 <= rank < min(shape):
            raise ValueError(f"rank {rank} is none of a matrix of {rows} x {columns}")
        return {"left": (torch.float32, (rows, rank)), "right": (torch.float32, (rank, columns))}
    if rank:
        raise ValueError(f"{kind} has no rank, and {rank} is given")
    scale = torch.float32, (rows,)
    if kind == "int8":
        return {"values": (torch.int8, shape), "scale": scale}
    groups = torch.uint8, (rows, -(-columns // GROUP))
    return {"codes": (torch.uint8, (rows, -(-columns // 2))), "groups": groups, "scale": scale}
