"""Naive twin of `longctx.merge_states`."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(out: Tensor, lse: Tensor, lse_override: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Joins attention over disjoint key sets: a state counts with weight exp(lse - merged lse)."""
    logits = (lse if lse_override is None else lse_override).double()
    merged_lse = torch.logsumexp(logits, dim=0)
    # A state with lse = -inf adds nothing, whatever its `out` holds.
    absent = torch.isneginf(logits)
    weights = torch.exp(logits - merged_lse).masked_fill(absent, 0.0)
    merged = (weights[..., None] * out.double().masked_fill(absent[..., None], 0.0)).sum(dim=0)
    return merged.to(out.dtype), merged_lse if lse.dtype == torch.float64 else merged_lse.float()
