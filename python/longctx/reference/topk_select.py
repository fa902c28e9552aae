"""Naive twin of `longctx.topk_select`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def best_first(row: Tensor) -> Tensor:
    """All indices of a row by score descending, then index ascending; NaN last."""
    is_nan = row.isnan()
    order = row.float().masked_fill(is_nan, -math.inf).sort(descending=True, stable=True).indices
    return torch.cat([order[~is_nan[order]], order[is_nan[order]]])


def select_rows(
    scores: Tensor,
    capacity: int,
    lengths: Tensor | None,
    num_first: int,
    num_last: int,
    choose: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`(indices, counts)` of the forced indices of each row and of the first of `choose(row, forced, others)` that fit.

    `others`, best first, and what `choose` returns of them are indices that are not forced.
    """
    rows, n = scores.shape[:-1], scores.shape[-1]
    table = scores.reshape(math.prod(rows), n).cpu()
    ends = [n] * len(table) if lengths is None else lengths.clamp(0, n).flatten().tolist()
    indices = torch.full((len(table), capacity), -1, dtype=torch.int32)
    counts = torch.zeros(len(table), dtype=torch.int32)
    for r, end in enumerate(ends):
        row = table[r, :end]
        is_forced = torch.zeros(end, dtype=torch.bool)
        is_forced[: min(num_first, end)] = True
        is_forced[max(0, end - num_last) :] = True
        forced = is_forced.nonzero().flatten()
        order = best_first(row)
        others = choose(row, forced, order[~is_forced[order]])
        chosen = torch.cat([forced, others[: capacity - len(forced)]]).sort().values
        indices[r, : len(chosen)] = chosen
        counts[r] = len(chosen)
    return indices.view(*rows, capacity).to(scores.device), counts.view(rows).to(scores.device)


def topk_select(
    scores: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    num_first: int = 0,
    num_last: int = 0,
) -> tuple[Tensor, Tensor]:
    """`(indices, counts)` by a stable sort of each row; see `longctx.topk_select`."""
    return select_rows(scores, k, lengths, num_first, num_last, lambda row, forced, others: others)
