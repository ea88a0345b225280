"""How weights are stored in fewer bits: what is kept of a matrix, and the matrix that this stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP = 64  # inputs that share a scale of nf4
# The 16 quantiles of a standard normal distribution, scaled to [-1, 1]: Dettmers et al. 2023, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_SHARES = (1.0, 0.9)  # of a group's largest magnitude, tried as its scale
NF4_ZERO = NF4.index(0.0)


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to values int8 (N, K) and scale (N,): weight = values * scale, the largest of a row becoming 127."""
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def fp8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to values float8_e4m3fn (N, K) and scale (N,): weight = values * scale, a row's largest becoming 448."""
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale[:, None]).clamp_(-448, 448).to(torch.float8_e4m3fn), scale


def nf4_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) two a byte, (N, K / 2): those of even inputs in the low half; an odd last one beside a zero."""
    pairs = F.pad(codes, (0, codes.shape[1] % 2), value=NF4_ZERO).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def nf4_codes(pairs: torch.Tensor) -> torch.Tensor:
    """The inverse: (N, K / 2) to (N, K)."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def nf4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K) to codes uint8 (N, K), group scales uint8 (N, K/64) and row scale (N,).

    weight = NF4[code] * row_scale * group_scale / 255: a group's scale, itself in 8 bits of its row's largest. Of a few
    scales from the group's largest magnitude downwards each group takes the one of the least squared error.
    """
    groups = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2)
    row_scale = largest.amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full_like(largest, torch.inf)
    codes, group_scale = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(largest, dtype=torch.uint8)
    table = torch.tensor(NF4, device=weight.device)
    for share in _SHARES:
        scale_codes = (largest / row_scale[:, None] * (255 * share)).ceil()
        scale = (row_scale[:, None] * (scale_codes / 255))[:, :, None]
        tried = torch.bucketize(groups / scale.clamp_min(torch.finfo(torch.float32).tiny), (table[1:] + table[:-1]) / 2)
        error = (table[tried] * scale - groups).square_().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better[:, :, None], tried.to(torch.uint8), codes)
        group_scale = torch.where(better, scale_codes.to(torch.uint8), group_scale)
    return codes.flatten(1)[:, : weight.shape[1]], group_scale, row_scale


def nf4_value(codes: torch.Tensor, group_scale: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """The matrix (N, K) that `nf4_of` stored."""
    scale = row_scale[:, None] * (group_scale.float() / 255)
    scale = scale.repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]
    return torch.tensor(NF4, device=codes.device)[codes.long()] * scale
