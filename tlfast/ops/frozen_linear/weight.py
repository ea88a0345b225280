"""The weight of a frozen linear layer, laid out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .formats import GROUP, NF4_ZERO, int8_of, nf4_of, nf4_value
from .panels import PANEL, from_panels, padded, panels_shape, to_panels

PRECISIONS = ("fp32", "bf16", "int8", "int8_weight_only", "nf4")


@dataclass(frozen=True)
class FrozenWeight:
    """W (N outputs, K inputs) and bias (N,) in one of `PRECISIONS`, in the order in which kernels read them.

    values: "fp32": W itself, row-major. Others in panels (panels.py): "bf16", "int8" and "int8_weight_only" alike, and
        codes of "nf4", two a byte.
    scale: float32, an output's (int8 and nf4). group_scale: uint8 in 255ths of it, (panels, groups of 64, 32) ("nf4").
    smooth: (K,) that multiplies the inputs of "int8" before they are quantised, and divides W; None: ones.
    bias: float32 in whole panels of 32, or None. gated: outputs are gates and what they gate, in turns of 16.
    """

    precision: str
    outputs: int
    inputs: int
    values: torch.Tensor
    scale: torch.Tensor | None = None
    group_scale: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gated: bool = False

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        precision: str = "fp32",
        smooth: torch.Tensor | None = None,
    ) -> FrozenWeight:
        """Store a float32 matrix (N, K); "fp32" shares its memory where it is row-major.

        Raises ValueError for another precision, numbers that are not finite, and smooth with a precision but "int8".
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, not {precision!r}")
        if weight.dim() != 2 or weight.dtype != torch.float32:
            raise ValueError(f"weight must be (N, K) in float32, not {tuple(weight.shape)} in {weight.dtype}")
        if smooth is not None and precision != "int8":
            raise ValueError(f'smooth must be None with precision={precision!r}: only "int8" quantises its inputs')
        if not torch.isfinite(weight).all() or not (bias is None or torch.isfinite(bias).all()):
            raise ValueError(
                "weight or bias holds NaN or infinity: it cannot be stored; look where the model comes from"
            )
        outputs, inputs = weight.shape
        kept: dict[str, Any] = {}
        weight = weight.detach()
        if precision == "fp32":
            kept["values"] = weight if weight.stride(1) == 1 else weight.contiguous()
        elif precision == "bf16":
            kept["values"] = to_panels(weight.bfloat16(), 2)
        elif precision in ("int8", "int8_weight_only"):
            values, scale = int8_of(weight if smooth is None else weight / smooth)
            kept |= {"values": to_panels(values, 4), "scale": _whole_panels(scale), "smooth": smooth}
        else:
            codes, group_scale, scale = nf4_of(weight)
            pairs = to_panels(codes, 2, NF4_ZERO)
            kept["values"] = pairs[..., 0] | pairs[..., 1] << 4
            kept |= {"group_scale": _group_panels(group_scale), "scale": _whole_panels(scale)}
        return cls(precision, outputs, inputs, bias=None if bias is None else _whole_panels(bias), **kept)

    @classmethod
    def of_gated(
        cls,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        precision: str = "bf16",
        smooth: torch.Tensor | None = None,
    ) -> FrozenWeight:
        """Store the gates (N, K) and what they gate (N, K) as one weight, whose layer gives activation(gates) * rest.

        Raises ValueError for "fp32", which is not stored in panels, and as `of` does.
        """
        if precision == "fp32":
            raise ValueError('precision must not be "fp32" for a gated weight: store gate and up as two weights')
        bias = None if biases is None else _in_turns(*biases)
        both = cls.of(_in_turns(gate, up), bias, precision, smooth)
        return replace(both, gated=True, outputs=2 * gate.shape[0])

    @classmethod
    def side_by_side(
        cls,
        pieces: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        precision: str = "bf16",
        smooth: torch.Tensor | None = None,
    ) -> list[FrozenWeight]:
        """Store several (W, b) of the same inputs in one piece of memory, each from a whole panel on.

        `joined` of the result is one weight that gives all their outputs, each filled up to whole panels. "fp32" is
        stored piece by piece. Raises ValueError as `of` does.
        """
        if len(pieces) == 1 or precision == "fp32":
            return [cls.of(weight, bias, precision, smooth) for weight, bias in pieces]
        fill = [(0, -len(weight) % PANEL) for weight, _ in pieces]
        weights = [F.pad(w.detach(), (0, 0, *end)) for (w, _), end in zip(pieces, fill, strict=True)]
        biases = [
            F.pad(w.new_zeros(len(w)) if b is None else b.detach(), e) for (w, b), e in zip(pieces, fill, strict=True)
        ]
        bias = None if all(b is None for _, b in pieces) else torch.cat(biases)
        whole, first, found = cls.of(torch.cat(weights), bias, precision, smooth), 0, []
        for weight, _ in pieces:
            found.append(whole._panels(first, padded(len(weight)), len(weight)))
            first += padded(len(weight))
        return found

    @classmethod
    def joined(cls, pieces: Sequence[FrozenWeight]) -> FrozenWeight | None:
        """The weight that gives the outputs of several from `side_by_side` at once, each filled up to whole panels.

        None where they do not lie side by side in memory, or one of them only has a bias.
        """
        if len(pieces) == 1:
            return pieces[0]
        head = pieces[0]
        joined: dict[str, Any] = {}
        for name in ("values", "scale", "group_scale", "bias"):
            tensors = [getattr(piece, name) for piece in pieces]
            if all(tensor is None for tensor in tensors):
                continue
            end = 0
            for tensor in tensors:
                if tensor is None or (end and tensor.data_ptr() != end) or head.precision == "fp32":
                    return None
                end = tensor.data_ptr() + tensor.nbytes
            shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
            joined[name] = tensors[0].as_strided(shape, tensors[0].stride())
        return replace(head, outputs=sum(padded(piece.outputs) for piece in pieces), **joined)

    def _panels(self, first: int, count: int, outputs: int) -> FrozenWeight:
        """A view of the outputs from `first`, a whole panel's, on."""
        panels, rows = slice(first // PANEL, (first + count) // PANEL), slice(first, first + count)
        group_scale = None if self.group_scale is None else self.group_scale[panels]
        scale = None if self.scale is None else self.scale[rows]
        bias = None if self.bias is None else self.bias[rows]
        values = self.values[panels]
        return replace(self, outputs=outputs, values=values, scale=scale, group_scale=group_scale, bias=bias)

    @property
    def width(self) -> int:
        """Outputs of the layer: half the weight's where it is gated."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.values.device

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        names = ("values", "scale", "group_scale", "smooth", "bias")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def value(self) -> torch.Tensor:
        """The matrix that is stored, (N, K) in float32 as the layer multiplies by it (that of `of`, smooth undone).

        Of a gated weight the gates stand above what they gate.
        """
        weight = self._stored()
        if self.smooth is not None:
            weight = weight * self.smooth
        return torch.cat(_out_of_turns(weight, self.width)) if self.gated else weight

    def bias_value(self) -> torch.Tensor | None:
        """The bias (N,), of a gated weight that of the gates first."""
        if self.bias is None:
            return None
        return torch.cat(_out_of_turns(self.bias, self.width)) if self.gated else self.bias[: self.outputs]

    def _stored(self) -> torch.Tensor:
        rows = padded(self.outputs) if self.gated else self.outputs
        if self.precision == "fp32":
            return self.values
        if self.precision == "bf16":
            return from_panels(self.values, rows, self.inputs).float()
        assert self.scale is not None
        scale = self.scale[:rows]
        if self.precision in ("int8", "int8_weight_only"):
            return from_panels(self.values, rows, self.inputs).float() * scale[:, None]
        assert self.group_scale is not None
        codes = from_panels(torch.stack((self.values & 15, self.values >> 4), dim=-1), rows, self.inputs)
        group_scale = self.group_scale.transpose(1, 2).flatten(0, 1)[:rows]
        return nf4_value(codes, group_scale, scale)


def stored_layout(precision: str, outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a FrozenWeight by name; "smooth" and "bias" may also be None.

    Raises ValueError for another precision than `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, not {precision!r}")
    rows = padded(outputs)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"bias": (torch.float32, (rows,))}
    if precision == "fp32":
        return layout | {"values": (torch.float32, (outputs, inputs))}
    if precision == "bf16":
        return layout | {"values": (torch.bfloat16, panels_shape(outputs, inputs, 2))}
    layout["scale"] = torch.float32, (rows,)
    if precision == "nf4":
        layout["group_scale"] = torch.uint8, (rows // PANEL, -(-inputs // GROUP), PANEL)
        return layout | {"values": (torch.uint8, panels_shape(outputs, inputs, 2)[:-1])}
    if precision == "int8":
        layout["smooth"] = torch.float32, (inputs,)
    return layout | {"values": (torch.int8, panels_shape(outputs, inputs, 4))}


def _whole_panels(vector: torch.Tensor) -> torch.Tensor:
    """(N,) in float32, with zeros to whole panels."""
    return F.pad(vector.detach().float(), (0, -len(vector) % PANEL)).contiguous()


def _group_panels(group_scale: torch.Tensor) -> torch.Tensor:
    """(N, K/64) to (panels, K/64, 32)."""
    rows = F.pad(group_scale, (0, 0, 0, -len(group_scale) % PANEL))
    return rows.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _in_turns(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of both, 16 of one and then 16 of the other; each filled up to whole turns with zeros."""
    half = PANEL // 2
    sides = [F.pad(x.detach(), (*(0, 0) * (x.dim() - 1), 0, -len(x) % half)) for x in (gate, up)]
    return torch.stack([side.unflatten(0, (-1, half)) for side in sides], dim=1).flatten(0, 2)


def _out_of_turns(rows: torch.Tensor, width: int) -> list[torch.Tensor]:
    turns = rows.unflatten(0, (-1, 2, PANEL // 2))
    return [turns[:, side].flatten(0, 1)[:width] for side in (0, 1)]


assert GROUP % PANEL == 0  # a group is whole steps of the kernels
