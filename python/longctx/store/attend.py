"""attend_tiers: attention where the data lives, and one merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.ops import gather_attention, merge_states


@dataclass(frozen=True)
class TierPart:
    """What one tier holds of the keys of a call.

    Attributes:
        k, v: `[num_frames, num_kv_heads, page_size, ..]` on the tier's device.
        page_table: int32 `[batch, max_pages]` there: the frame of each page, -1 where another part has it.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor


def attend_tiers(
    q: Tensor,
    parts: Sequence[TierPart],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    seqused_k: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`gather_attention` over keys that lie in several tiers: each part on its own device, then one merge.

    Each part sees the whole selection and skips the pages that it does not have. Only q and the partial results cross
    between devices, `2 * num_q_heads * head_dim` values a layer instead of the keys.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`; the result is on its device.
        parts: disjoint: each page that the call reads is in one of them.
        indices, counts, seqused_k, options: as in `gather_attention`.

    Returns:
        `(out, lse)` as from `gather_attention` over the union.

    Example:
        >>> import torch, longctx
        >>> from longctx.store import TierPart, attend_tiers
        >>> q, k, v = torch.randn(1, 4, 1, 16), torch.randn(8, 2, 4, 16), torch.randn(8, 2, 4, 16)
        >>> indices, used = torch.tensor([0, 3, 7]).int().expand(1, 2, 1, 3), torch.tensor([32]).int()
        >>> table = torch.arange(8, dtype=torch.int32)[None]
        >>> parts = [TierPart(k, v, table.where(table % 2 == odd, -1)) for odd in (0, 1)]
        >>> out, lse = attend_tiers(q, parts, indices, seqused_k=used, block_size_k=4)
        >>> whole = longctx.gather_attention(q, k, v, indices, seqused_k=used, block_size_k=4, page_table=table)
        >>> torch.allclose(out, whole[0], atol=1e-5)
        True
    """
    states = [attend_part(q, part, indices, counts, seqused_k=seqused_k, **options) for part in parts]
    return merge_parts(states, q)


def attend_part(
    q: Tensor, part: TierPart, indices: Tensor, counts: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`gather_attention` over what one tier holds, on its device."""
    device = part.k.device
    options = {name: _to(value, device) for name, value in options.items()}
    out, lse = gather_attention(
        _to(q, device),
        part.k,
        part.v,
        _to(indices, device),
        _to(counts, device),
        page_table=part.page_table,
        **options,
    )
    return out, lse


def merge_parts(states: Sequence[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results of several parts as one, on q's device and in its dtype."""
    if len(states) == 1:
        return states[0][0].to(q.device), states[0][1].to(q.device)
    out = torch.stack([out.to(q.device) for out, _ in states])
    lse = torch.stack([lse.to(q.device) for _, lse in states])
    return merge_states(out, lse)


def _to(value: Any, device: torch.device) -> Any:
    # A copy to the host that is not waited for may be read before it has arrived.
    return value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value
