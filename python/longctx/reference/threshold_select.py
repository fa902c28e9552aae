"""Naive twin of `longctx.threshold_select`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.reference.topk_select import select_rows

# 2^-f is about 1 - f (c1 - f (c2 - f (c3 - f (c4 - f c5)))) for f in [0, 1), in units of 2^-30.
_COEFFICIENTS = (1073741824, 744257104, 257888339, 59364965, 9871774, 1008956)


def logit_masses(row: Tensor) -> Tensor:
    """int64: the mass of each score of a row, as `longctx.threshold_select` defines it."""
    scores = row.float()
    ordered = scores[scores > -math.inf]
    if ordered.numel() == 0:
        return torch.zeros(scores.shape, dtype=torch.int64)
    highest = ordered.max()
    distance = (highest - scores).masked_fill(scores == highest, 0.0)
    binades = distance * torch.tensor(1.44269504, dtype=torch.float32)
    weighs = binades < 42.0
    fixed = torch.floor(binades.where(weighs, 0.0).double() * 2**24).long()
    whole, fraction = fixed >> 24, fixed & (2**24 - 1)
    power = torch.zeros_like(fixed)
    for coefficient in reversed(_COEFFICIENTS):
        power = coefficient - (power * fraction >> 24)
    length_bits = len(row).bit_length()
    shift = 40 if length_bits <= 21 else 61 - length_bits
    return ((power << 10) >> (40 - shift + whole)).where(weighs, 0)


def threshold_select(
    scores: Tensor,
    *,
    value: float,
    method: str = "threshold",
    max_k: int,
    lengths: Tensor | None = None,
    num_first: int = 0,
    num_last: int = 0,
) -> tuple[Tensor, Tensor]:
    """`(indices, counts)` from a stable sort and sums of integers; see `longctx.threshold_select`."""
    limit = torch.tensor(value, dtype=torch.float32)

    def above(row: Tensor, forced: Tensor, others: Tensor) -> Tensor:
        return others[row[others].float() >= limit]

    def share(row: Tensor, forced: Tensor, others: Tensor) -> Tensor:
        masses = logit_masses(row)
        total = int(masses.sum())
        target = min(total, math.ceil(min(max(float(limit), 0.0), 1.0) * float(total)))
        missing = target - int(masses[forced].sum())
        if missing <= 0:
            return others[:0]
        reached = masses[others].cumsum(0)
        return others[: int((reached < missing).sum()) + 1]

    return select_rows(scores, max_k, lengths, num_first, num_last, share if method == "cumulative" else above)
