"""Naive twin of `longctx.page_scores`, and how scores are reduced."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_heads(scores: Tensor, head_reduce: str, key_heads: int) -> Tensor:
    """[batch, num_q_heads, seqlen_q, n] -> [batch, heads, seqlen_q, n]."""
    if head_reduce == "none":
        return scores
    if head_reduce == "all_sum":
        return scores.sum(dim=1, keepdim=True)
    groups: Tensor = scores.unflatten(1, (key_heads, -1))
    if head_reduce == "group_max":
        return torch.amax(groups, dim=2)
    return torch.mean(groups, dim=2) if head_reduce == "group_mean" else torch.sum(groups, dim=2)


def reduce_tokens(scores: Tensor, visible: Tensor, query_reduce: str) -> Tensor:
    """Over the tokens that see a key: `visible` bool like `scores`; -inf where none does."""
    if query_reduce == "none":
        return scores.masked_fill(~visible, -torch.inf)
    none = ~visible.any(dim=2, keepdim=True)
    if query_reduce == "max":
        if scores.shape[2] == 0:
            return scores.new_full((*scores.shape[:2], 1, scores.shape[3]), -torch.inf)
        return scores.masked_fill(~visible, -torch.inf).amax(dim=2, keepdim=True)
    number = visible.sum(dim=2, keepdim=True).clamp(min=1)
    return (scores.masked_fill(~visible, 0.0).sum(dim=2, keepdim=True) / number).masked_fill(none, -torch.inf)


def visible_pages(
    q: Tensor, summary: Tensor, method: str, counts: Tensor | None, seqused_k: Tensor | None, page_size: int | None
) -> Tensor:
    """bool [batch, heads of the summary, seqlen_q, num_pages]."""
    batch, heads, num_pages = summary.shape[:3]
    exists = torch.ones(batch, heads, num_pages, dtype=torch.bool)
    if counts is not None:
        exists &= counts > 0
    if method == "minmax":
        exists &= ~(summary[:, :, :, 0, 0] > summary[:, :, :, 1, 0])
    visible = exists[:, :, None].expand(batch, heads, q.shape[2], num_pages).clone()
    if seqused_k is not None and page_size is not None:
        for b, used in enumerate(seqused_k.clamp(0, num_pages * page_size).tolist()):
            for i in range(q.shape[2]):
                position = used - q.shape[2] + i
                visible[b, :, i] &= torch.arange(num_pages) * page_size <= position
    return visible


def page_scores(
    q: Tensor,
    summary: Tensor,
    *,
    method: str = "minmax",
    head_reduce: str = "none",
    query_reduce: str = "none",
    softmax: bool = False,
    counts: Tensor | None = None,
    softmax_scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_size: int | None = None,
) -> Tensor:
    """The formula in float64; see `longctx.page_scores`."""
    visible = visible_pages(q, summary, method, counts, seqused_k, page_size)
    scores = scores_of(q.double(), summary.double(), visible, method, softmax, counts, softmax_scale)
    return reduced(scores, visible, head_reduce, query_reduce).float()


def scores_of(
    q: Tensor,
    summary: Tensor,
    visible: Tensor,
    method: str,
    softmax: bool,
    counts: Tensor | None,
    softmax_scale: float | None,
) -> Tensor:
    """[batch, num_q_heads, seqlen_q, num_pages] in q's dtype, before reductions."""
    batch, num_q_heads, _, head_dim = q.shape
    heads, num_pages = summary.shape[1:3]
    group_size = num_q_heads // heads
    x = q * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    rows = summary.repeat_interleave(group_size, dim=1)
    if method == "minmax":
        empty = rows[:, :, :, :1, :1] > rows[:, :, :, 1:, :1]
        rows = rows.masked_fill(empty, 0.0)
        ends = x[:, :, :, None, None] * rows[:, :, None]  # [batch, num_q_heads, seqlen_q, num_pages, 2, head_dim]
        scores = ends.amax(dim=4).sum(dim=-1)
    else:
        scores = x @ rows.transpose(2, 3)
    if not softmax:
        return scores
    seen = visible.repeat_interleave(group_size, dim=1)
    number = torch.ones(batch, heads, num_pages) if counts is None else counts.clamp(min=0)
    logits = scores.masked_fill(~seen, -torch.inf)
    top = logits.amax(dim=-1, keepdim=True) if num_pages else logits.sum(dim=-1, keepdim=True)
    weights = torch.exp(logits - top.where(top.isfinite(), 0.0))
    total = (weights * number.repeat_interleave(group_size, dim=1)[:, :, None].to(q.dtype)).sum(dim=-1, keepdim=True)
    return (weights / total).where(seen, 0.0)


def reduced(scores: Tensor, visible: Tensor, head_reduce: str, query_reduce: str) -> Tensor:
    """Over heads, then tokens; `visible` has the heads of the keys. Hidden scores are -inf."""
    key_heads = visible.shape[1]
    heads = scores.shape[1] if head_reduce == "none" else key_heads
    seen = visible.repeat_interleave(heads // key_heads, dim=1)
    if head_reduce == "all_sum":
        seen = seen.all(dim=1, keepdim=True)
    return reduce_tokens(reduce_heads(scores, head_reduce, key_heads), seen, query_reduce)
