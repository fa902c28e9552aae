"""page_scores: a score for each page of keys, from its summary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op

HeadReduce = Literal["none", "group_mean", "group_max", "group_sum", "all_sum"]
QueryReduce = Literal["none", "mean", "max"]


def page_scores(
    q: Tensor,
    summary: Tensor,
    *,
    method: Literal["minmax", "dot"] = "minmax",
    head_reduce: HeadReduce = "none",
    query_reduce: QueryReduce = "none",
    softmax: bool = False,
    counts: Tensor | None = None,
    softmax_scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_size: int | None = None,
    validate: bool = False,
) -> Tensor:
    """Scores pages of keys, or clusters of them, for each query token; `topk_select` then chooses what to read.

    - `"minmax"`: `s = sum_d max(x_d low_d, x_d high_d)` with `x = softmax_scale * q` and the extremes of a page: no key
      of it has a higher `softmax_scale * q . k`.
    - `"dot"`: `s = softmax_scale * q . summary`.

    With `softmax`, a score becomes `exp(s_p) / sum_j counts[j] exp(s_j)` over the pages that the token sees (without
    `counts`, each counts once). Then scores are reduced over heads, then over tokens. A page that a token does not see
    scores -inf; `query_reduce` joins the tokens that see the page.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64, bfloat16 or float16. Any strides with a
            contiguous last dim.
        summary: what `summarize_pages` returns, in q's dtype: `[batch, heads, num_pages, 2, head_dim]` for
            `"minmax"`, else `[batch, heads, num_pages, head_dim]`; heads divides `num_q_heads`. Any strides of the
            first three dims.
        method: as above. Centroids of `kmeans` take `"dot"`.
        head_reduce: `"group_mean"`, `"group_max"`, `"group_sum"` over the query heads that share a head of `summary`;
            `"all_sum"` over all query heads; `"none"`.
        query_reduce: `"mean"` or `"max"` over query tokens; `"none"`.
        softmax: as above.
        counts: int32 `[batch, heads, num_pages]`, last dim contiguous: the number of keys of each page. A page of 0
            keys does not exist.
        softmax_scale: factor on the scores; `None` means `head_dim ** -0.5`.
        seqused_k: int32 `[batch]`: the number of keys. Pages then follow each other as keys do: token `i` stands at
            key position `seqused_k - seqlen_q + i` and sees the pages that begin at or before it. Without, every token
            sees all pages, but those that hold no key, where that can be told: by `counts`, or by the extremes.
        page_size: keys of a page; with `seqused_k`, and only then.
        validate: also check the values of seqused_k and counts (reads them).

    Returns:
        float32 `[batch, num_q_heads | heads | 1, seqlen_q | 1, num_pages]`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * head_dim` FLOPs per query row and page (`"minmax"`: twice that); the summary is read once for all query
    heads that share it: bound by memory for a few query rows. Deterministic: the same bits on any number of threads.
    On CUDA one launch where at most eight query rows share a head of the summary, and no softmax nor `"all_sum"` is
    asked for; else two, with a softmax three. Gradients: none yet (raises NotImplementedError).
    Source: Quest (arXiv 2406.10774) for `"minmax"`, InfLLM (arXiv 2402.04617) for `"all_sum"` over a mean of tokens,
    Squeezed Attention (arXiv 2411.09688) for the softmax weighted by counts.

    Example:
        >>> import torch, longctx
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> summary = longctx.summarize_pages(k, 16)
        >>> scores = longctx.page_scores(q, summary, head_reduce="group_max")
        >>> scores.shape
        torch.Size([1, 2, 1, 63])
        >>> pages, _ = longctx.topk_select(scores, 8)
        >>> out, lse = longctx.gather_attention(q, k, v, pages, block_size_k=16, num_last=16)
    """
    if validate:
        _validate.lengths("page_scores", "seqused_k", seqused_k, summary.shape[2] * (page_size or 1))
        if counts is not None and counts.numel() > 0 and int(counts.min()) < 0:
            raise ValueError(f"longctx::page_scores: `counts` must not be negative; got {int(counts.min())}")
    result: Tensor = call(
        torch.ops.longctx.page_scores,
        q,
        summary,
        method,
        head_reduce,
        query_reduce,
        softmax,
        counts,
        softmax_scale,
        seqused_k,
        page_size,
    )
    return result


def empty_scores(q: Tensor, key_heads: int, head_reduce: str, query_reduce: str, num_scores: int) -> Tensor:
    """A tensor of the shape and dtype of reduced scores."""
    heads = {"none": q.shape[1], "all_sum": 1}.get(head_reduce, key_heads)
    rows = q.shape[2] if query_reduce == "none" else 1
    return q.new_empty((q.shape[0], heads, rows, num_scores), dtype=torch.float32)


def _fake(
    q: Tensor,
    summary: Tensor,
    method: str = "minmax",
    head_reduce: str = "none",
    query_reduce: str = "none",
    *options: object,
) -> Tensor:
    return empty_scores(q, summary.shape[1], head_reduce, query_reduce, summary.shape[2])


register_op("page_scores", _fake)
