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
) -> Tensor:
    """The sets: bool [batch, num_q_heads, seqlen_q, seqlen_k]."""
    batch, heads, seqlen_q, num_entries = indices.shape
    mask = torch.zeros(batch, num_q_heads, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        length = seqlen_k if seqused_k is None else int(seqused_k[b])
        for i in range(seqlen_q):
            visible = max(0, length - seqlen_q + i + 1)
            for h in range(num_q_heads):
                head = h * heads // num_q_heads
                kept = num_entries if counts is None else int(counts[b, head, i])
                chosen = mask[b, h, i]
                for entry in indices[b, head, i, :kept].tolist():
                    if entry >= 0:
                        chosen[entry * block_size_k : (entry + 1) * block_size_k] = True
                chosen[:num_first] = True
                chosen[max(0, visible - num_last) : visible] = True
                chosen[visible:] = False
    return mask


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
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` as dense attention under the mask of what was selected; see `longctx.gather_attention`."""
    mask = selected_keys(
        indices,
        counts,
        num_q_heads=q.shape[1],
        seqlen_k=k.shape[2],
        block_size_k=block_size_k,
        num_first=num_first,
        num_last=num_last,
        seqused_k=seqused_k,
    )
    # Row by row: a key that another row selected may hold anything.
    rows = [slice(i, i + 1) for i in range(q.shape[2])] or [slice(0, 0)]
    out, lse = zip(
        *(
            masked_attention(
                q[:, :, row], k, v, mask[:, :, row], softmax_scale=softmax_scale, softcap=softcap, sinks=None
            )
            for row in rows
        ),
        strict=True,
    )
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)
