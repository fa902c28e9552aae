"""Naive twins of `longctx.summarize_pages` and `longctx.update_pages`."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.reference.gather_attention import from_pages
from longctx.reference.topk_select import best_first


def existing_keys(k: Tensor, seqused_k: Tensor | None, page_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(keys [batch, num_kv_heads, seqlen_k, head_dim], exists [batch, seqlen_k])`."""
    if page_table is None or seqused_k is None:
        exists = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
        if seqused_k is not None:
            exists = torch.arange(k.shape[2]) < seqused_k.cpu()[:, None]
        return k, exists
    seqlen_k = page_table.shape[1] * k.shape[2]
    used = seqused_k.clamp(0, seqlen_k)
    exists = (torch.arange(seqlen_k) < used.cpu()[:, None]) & (
        (page_table >= 0) & (page_table < k.shape[0])
    ).cpu().repeat_interleave(k.shape[2], dim=1)
    known = page_table.where((page_table >= 0) & (page_table < k.shape[0]), 0)
    return from_pages(k, known, used), exists


def summary_of(
    keys: Tensor, method: str, scores: Tensor | None, num_representative: int, query: Tensor | None, scale: float
) -> Tensor:
    """Of the keys [n, head_dim] of one page: [head_dim], for "minmax" [2, head_dim]."""
    if method == "minmax":
        low = keys.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        high = keys.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        ends = keys.new_tensor([torch.inf, -torch.inf])[:, None].expand(2, keys.shape[1])
        return torch.stack([torch.cat([low, ends[:1]]).amin(dim=0), torch.cat([high, ends[1:]]).amax(dim=0)])
    if len(keys) == 0:
        return keys.new_zeros(keys.shape[1])
    if scores is not None:
        keys = keys[best_first(scores)[:num_representative]]
    if query is not None:
        return torch.softmax(scale * (keys @ query), dim=0) @ keys
    return keys.mean(dim=0)


def summarize_pages(
    k: Tensor,
    page_size: int,
    *,
    method: str = "minmax",
    key_scores: Tensor | None = None,
    num_representative: int = 4,
    queries: Tensor | None = None,
    softmax_scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Page by page; see `longctx.summarize_pages`."""
    keys, exists = existing_keys(k, seqused_k, page_table)
    batch, kv_heads, seqlen_k, head_dim = keys.shape
    num_pages = -(-seqlen_k // page_size)
    own = key_scores if key_scores is not None else queries
    heads = kv_heads if own is None else own.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    extremes = (2,) if method == "minmax" else ()
    summary = torch.zeros(batch, heads, num_pages, *extremes, head_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for p in range(num_pages):
                page = slice(p * page_size, (p + 1) * page_size)
                here = exists[b, page]
                summary[b, h, p] = summary_of(
                    keys[b, h * kv_heads // heads, page][here].double(),
                    method,
                    None if key_scores is None else key_scores[b, h, page][here],
                    num_representative,
                    None if queries is None else queries[b, h, p].double(),
                    scale,
                )
    return summary.to(k.dtype)


def update_pages(
    summary: Tensor,
    k: Tensor,
    start: int | Tensor,
    page_size: int,
    *,
    method: str = "minmax",
    key_scores: Tensor | None = None,
    num_representative: int = 4,
    queries: Tensor | None = None,
    softmax_scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> None:
    """The pages that hold keys at or after `start`, from a summary of all; see `longctx.update_pages`."""
    options = {"method": method, "key_scores": key_scores, "num_representative": num_representative,
               "queries": queries, "softmax_scale": softmax_scale, "page_table": page_table}  # fmt: skip
    fresh = summarize_pages(k, page_size, seqused_k=seqused_k, **options)  # type: ignore[arg-type]
    seqlen_k = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
    for b in range(fresh.shape[0]):
        first = max(0, int(start[b]) if isinstance(start, Tensor) else start)
        used = seqlen_k if seqused_k is None else min(max(int(seqused_k[b]), 0), seqlen_k)
        if first < used:
            pages = slice(first // page_size, -(-used // page_size))
            summary[b, :, pages] = fresh[b, :, pages]
