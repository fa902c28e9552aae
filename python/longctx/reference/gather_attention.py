"""Naive twin of `longctx.gather_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.reference.attention import masked_attention


def selected_keys(
    indices: Tensor,
    counts: Tensor | None,
    *,
    num_q_heads: int,
    seqlen_k: int,
    block_size_k: int,
    num_first: int,
    num_last: int,
    seqused_k: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """What is added to the scores: float64 [batch, num_q_heads, seqlen_q, seqlen_k], -inf outside the sets."""
    batch, heads, seqlen_q, num_entries = indices.shape
    added = torch.full((batch, num_q_heads, seqlen_q, seqlen_k), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        length = seqlen_k if seqused_k is None else int(seqused_k[b])
        for i in range(seqlen_q):
            visible = max(0, length - seqlen_q + i + 1)
            for h in range(num_q_heads):
                head = h * heads // num_q_heads
                kept = num_entries if counts is None else int(counts[b, head, i])
                row = added[b, h, i]
                for e, entry in enumerate(indices[b, head, i, :kept].tolist()):
                    if entry >= 0:
                        row[entry * block_size_k : (entry + 1) * block_size_k] = (
                            0.0 if bias is None else float(bias[b, head, i, e])
                        )
                row[:num_first] = 0.0
                row[max(0, visible - num_last) : visible] = 0.0
                row[visible:] = -torch.inf
    return added


def from_pages(cache: Tensor, page_table: Tensor, seqused_k: Tensor) -> Tensor:
    """[batch, num_kv_heads, max_pages * page_size, dim] of a paged cache; 0 where `seqused_k` has no key."""
    _, heads, page_size, dim = cache.shape
    keys = cache.new_zeros(page_table.shape[0], heads, page_table.shape[1] * page_size, dim)
    for b, used in enumerate(seqused_k.tolist()):
        for key in range(used):
            page = int(page_table[b, key // page_size])
            keys[b, :, key] = cache[page, :, key % page_size]
    return keys


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    block_size_k: int = 1,
    num_first: int = 0,
    num_last: int = 0,
    bias: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as dense attention under the mask of what was selected; see `longctx.gather_attention`."""
    if page_table is not None and seqused_k is not None:
        k, v = (from_pages(cache, page_table, seqused_k) for cache in (k, v))
    added = selected_keys(
        indices,
        counts,
        num_q_heads=q.shape[1],
        seqlen_k=k.shape[2],
        block_size_k=block_size_k,
        num_first=num_first,
        num_last=num_last,
        seqused_k=seqused_k,
        bias=bias,
    )
    # Row by row: a key that another row selected may hold anything.
    rows = [slice(i, i + 1) for i in range(q.shape[2])] or [slice(0, 0)]
    out, lse = zip(
        *(
            masked_attention(
                q[:, :, row],
                k,
                v,
                ~torch.isneginf(added[:, :, row]),
                softmax_scale=softmax_scale,
                softcap=softcap,
                sinks=None,
                bias=added[:, :, row],
            )
            for row in rows
        ),
        strict=True,
    )
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)
