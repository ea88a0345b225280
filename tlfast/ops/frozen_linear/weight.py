"""The weight of a frozen linear layer, laid out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .formats import GROUP, fp8_of, int8_of, nf4_bytes, nf4_codes, nf4_of, nf4_value
from .layout import (
    LAYOUTS,
    PANELS,
    ROWS,
    TURN,
    group_rows_of,
    in_turns,
    lay_out,
    lay_out_groups,
    layout_for,
    out_of_turns,
    rows_of,
    stored_shape,
)
from .panels import PANEL, padded, panels_shape

PRECISIONS = ("fp32", "bf16", "int8", "int8_weight_only", "nf4", "fp8")
_IN_ROWS = ("fp32", "fp8")  # alone


@dataclass(frozen=True)
class FrozenWeight:
    """W (N outputs, K inputs) and bias (N,) in one of `PRECISIONS`, in the order in which its device's kernels read it.

    values: "fp32": W itself, row-major. Others on the CPU in panels (panels.py): "bf16", "int8" and "int8_weight_only"
        alike, and codes of "nf4", two a byte. On a CUDA GPU, and "fp8" everywhere, in rows: (N, K), N filled up to
        whole panels of 32 and K to whole steps of a panel, which hold the same numbers.
    scale: float32, an output's (int8, fp8 and nf4). group_scale: uint8 in 255ths of it ("nf4"), (panels, groups of 64,
        32) in panels and (N, groups) in rows.
    smooth: (K,) that multiplies the inputs of "int8" before they are quantised, and divides W; None: ones.
    bias: float32 in whole panels of 32, or None. gated: outputs are gates and what they gate, in turns of 16 in panels
        and of 1 in rows.
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
        """Store a float32 matrix (N, K), laid out for its device; "fp32" shares its memory where it is row-major.

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
        bias = None if bias is None else _whole_panels(bias)
        weight = weight.detach()
        if precision == "fp32":
            values = weight if weight.stride(1) == 1 else weight.contiguous()
            return cls(precision, outputs, inputs, values, bias=bias)
        layout, scale, group_scale = layout_for(weight.device, precision), None, None
        if precision == "bf16":
            values = weight.bfloat16()
        elif precision == "fp8":
            values, scale = fp8_of(weight)
        elif precision == "nf4":
            codes, groups, scale = nf4_of(weight)
            values, group_scale = nf4_bytes(codes), lay_out_groups(groups, layout)
        else:
            values, scale = int8_of(weight if smooth is None else weight / smooth)
        scale = None if scale is None else _whole_panels(scale)
        values = lay_out(values, precision, layout)
        return cls(precision, outputs, inputs, values, scale, group_scale, smooth, bias)

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
        turn = TURN[layout_for(gate.device, precision)]
        bias = None if biases is None else in_turns(biases[0], biases[1], turn)
        both = cls.of(in_turns(gate, up, turn), bias, precision, smooth)
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
        rows = slice(first, first + count)
        panels = rows if self.layout == ROWS else slice(first // PANEL, (first + count) // PANEL)
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
    def layout(self) -> str:
        """Rows or panels: layout.py."""
        return ROWS if self.values.dim() == 2 else PANELS

    def in_layout(self, layout: str) -> FrozenWeight:
        """The same weight in the layout that another device reads; itself where it lies so. No number changes.

        Raises ValueError for an unknown layout, and for panels of "fp8", which no CPU kernel reads.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, not {layout!r}")
        if layout == self.layout or self.precision == "fp32":
            return self
        if self.precision in _IN_ROWS:
            raise ValueError(f"layout must be {ROWS!r} with precision={self.precision!r}, not {layout!r}")

        def turned(rows: torch.Tensor | None) -> torch.Tensor | None:
            if rows is None or not self.gated:
                return rows
            gates, rest = out_of_turns(rows, len(rows) // 2, TURN[self.layout])
            return in_turns(gates, rest, TURN[layout])

        values, groups = turned(rows_of(self.values, self.precision)), None
        assert values is not None
        if self.group_scale is not None:
            groups = turned(group_rows_of(self.group_scale))
            groups = None if groups is None else lay_out_groups(groups, layout)
        values = lay_out(values, self.precision, layout)
        return replace(self, values=values, scale=turned(self.scale), group_scale=groups, bias=turned(self.bias))

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
        return torch.cat(out_of_turns(weight, self.width, TURN[self.layout])) if self.gated else weight

    def bias_value(self) -> torch.Tensor | None:
        """The bias (N,), of a gated weight that of the gates first."""
        if self.bias is None:
            return None
        if not self.gated:
            return self.bias[: self.outputs]
        return torch.cat(out_of_turns(self.bias, self.width, TURN[self.layout]))

    def _stored(self) -> torch.Tensor:
        if self.precision == "fp32":
            return self.values
        rows = padded(self.outputs) if self.gated else self.outputs
        values = rows_of(self.values, self.precision)[:rows]
        if self.precision == "bf16":
            return values[:, : self.inputs].float()
        assert self.scale is not None
        scale = self.scale[:rows]
        if self.precision != "nf4":
            return values[:, : self.inputs].float() * scale[:, None]
        assert self.group_scale is not None
        return nf4_value(nf4_codes(values)[:, : self.inputs], group_rows_of(self.group_scale)[:rows], scale)


def stored_layout(precision: str, outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape on the CPU of each tensor of a FrozenWeight by name; "smooth" and "bias" may also be None.

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
    if precision == "fp8":
        return layout | {"values": (torch.float8_e4m3fn, stored_shape(precision, outputs, inputs))}
    if precision == "nf4":
        layout["group_scale"] = torch.uint8, (rows // PANEL, -(-inputs // GROUP), PANEL)
        return layout | {"values": (torch.uint8, panels_shape(outputs, inputs, 2)[:-1])}
    if precision == "int8":
        layout["smooth"] = torch.float32, (inputs,)
    return layout | {"values": (torch.int8, panels_shape(outputs, inputs, 4))}


def _whole_panels(vector: torch.Tensor) -> torch.Tensor:
    """(N,) in float32, with zeros to whole panels."""
    return F.pad(vector.detach().float(), (0, -len(vector) % PANEL)).contiguous()


assert GROUP % PANEL == 0  # a group is whole steps of the kernels
