"""Naive twin of `longctx.token_scores`."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.reference.page_scores import reduced
from longctx.reference.summarize_pages import existing_keys


def token_scores(
    q: Tensor,
    k: Tensor,
    *,
    head_reduce: str = "none",
    query_reduce: str = "none",
    candidates: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """The formula in float64; see `longctx.token_scores`."""
    k, visible = visible_keys(q, k, seqused_k, page_table)
    scores = logits_of(q.double(), k.double().nan_to_num(), softmax_scale, softcap)
    if candidates is not None:
        scores, visible = at_candidates(scores, visible, candidates, k.shape[1])
    return reduced(scores, visible, head_reduce, query_reduce).float()


def visible_keys(q: Tensor, k: Tensor, seqused_k: Tensor | None, page_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(keys without pages, visible bool [batch, num_kv_heads, seqlen_q, seqlen_k])`."""
    seqlen_k = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
    keys, exists = existing_keys(k, seqused_k, page_table)
    batch, seqlen_q = q.shape[0], q.shape[2]
    visible = torch.zeros(batch, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        used = seqlen_k if seqused_k is None else min(max(int(seqused_k[b]), 0), seqlen_k)
        for i in range(seqlen_q):
            visible[b, i, : max(0, used - seqlen_q + i + 1)] = True
    return keys, (visible & exists[:, None])[:, None].expand(batch, k.shape[1], seqlen_q, seqlen_k)


def logits_of(q: Tensor, k: Tensor, softmax_scale: float | None, softcap: float) -> Tensor:
    """[batch, num_q_heads, seqlen_q, seqlen_k] in q's dtype."""
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    scores = (q * scale) @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3)
    return softcap * torch.tanh(scores / softcap) if softcap > 0.0 else scores


def at_candidates(scores: Tensor, visible: Tensor, candidates: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """`(scores, visible)` of the listed keys; `visible` has kv heads, or query heads where these list their own."""
    batch, num_q_heads, seqlen_q, seqlen_k = scores.shape
    heads = candidates.shape[1]
    list_heads = max(kv_heads, heads)
    listed = candidates.long().repeat_interleave(list_heads // heads, dim=1)
    listed = listed.expand(batch, list_heads, seqlen_q, candidates.shape[3])
    inside = (listed >= 0) & (listed < seqlen_k)
    place = listed.where(inside, 0)
    if seqlen_k == 0:
        scores, visible = scores.new_zeros(*scores.shape[:3], 1), visible.new_zeros(*visible.shape[:3], 1)
    seen = visible.repeat_interleave(list_heads // kv_heads, dim=1).gather(3, place) & inside
    return scores.gather(3, place.repeat_interleave(num_q_heads // list_heads, dim=1)), seen
