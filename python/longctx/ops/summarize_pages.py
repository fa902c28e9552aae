"""summarize_pages: one or two rows that stand for the keys of each page."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op

SummaryMethod = Literal["minmax", "mean", "representative", "pooled"]


def summarize_pages(
    k: Tensor,
    page_size: int,
    *,
    method: SummaryMethod = "minmax",
    key_scores: Tensor | None = None,
    num_representative: int = 4,
    queries: Tensor | None = None,
    softmax_scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Sums up each page of `page_size` keys: what `page_scores` needs to tell which pages are worth reading.

    - `"minmax"`: the minimum and the maximum of every element: `page_scores` makes of them a bound that no `q . k` of
      the page exceeds (Quest).
    - `"mean"`: the mean of the keys.
    - `"representative"`: the mean of the `num_representative` keys with the highest `key_scores`, in the order of
      `topk_select` (InfLLM).
    - `"pooled"`: `sum_j softmax_j(softmax_scale * queries . k[j]) k[j]`: the keys as one query of the page sees them
      (LongHeads).

    Page `p` holds keys `[p * page_size, (p + 1) * page_size)` of those that exist; the last may be shorter.

    Args:
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`, float32, float64, bfloat16 or float16. Any strides with a
            contiguous last dim, as for queries.
        page_size: keys of a page, 1 to `2**20`.
        method: as above.
        key_scores: float32 `[batch, heads, seqlen_k]`, heads a multiple of `num_kv_heads` (query heads may choose for
            themselves); last dim contiguous. With `"representative"`, and only then.
        num_representative: how many keys are averaged; all, where a page has fewer.
        queries: `[batch, heads, num_pages, head_dim]` in k's dtype, heads a multiple of `num_kv_heads`. With
            `"pooled"`, and only then.
        softmax_scale: factor on `queries . k`; `None` means `head_dim ** -0.5`.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist.
        page_table: int32 `[batch, max_pages]`: k is then `[num_cache_pages, num_kv_heads, cache_page_size, head_dim]`
            and its pages lie where the table says, as in `gather_attention`. `page_size` is independent of
            `cache_page_size`. Needs `seqused_k`. Keys of pages that do not exist are skipped.
        validate: also check the values of seqused_k and page_table (reads them).

    Returns:
        `[batch, heads, num_pages, head_dim]` in k's dtype, for `"minmax"` `[batch, heads, num_pages, 2, head_dim]`,
        minima before maxima; `num_pages = ceil(seqlen_k / page_size)`, heads those of k, key_scores or queries. A page
        without keys is 0, for `"minmax"` inf and -inf. NaN in a key is left out of `"minmax"`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: every key is read once: bound by memory (`"pooled"`: `4 * head_dim` FLOPs per head and key besides).
    Deterministic: a page depends on its own keys alone, in their order, so that it has the same bits on any number of
    threads and after `update_pages`. Minima and maxima are exact. On CUDA one launch, a warp a page:
    slow where few pages are long. Gradients: none yet (raises NotImplementedError).
    Source: Quest (arXiv 2406.10774), InfLLM (arXiv 2402.04617), LongHeads (arXiv 2402.10685).

    Example:
        >>> import torch, longctx
        >>> k = torch.randn(1, 2, 1000, 64)
        >>> longctx.summarize_pages(k, 16).shape
        torch.Size([1, 2, 63, 2, 64])
        >>> means = longctx.summarize_pages(k, 100, method="mean")
        >>> torch.allclose(means[:, :, 3], k[:, :, 300:400].mean(dim=2), atol=1e-6)
        True
    """
    if validate:
        check_values("summarize_pages", k, seqused_k, page_table)
    result: Tensor = call(
        torch.ops.longctx.summarize_pages,
        k,
        page_size,
        method,
        key_scores,
        num_representative,
        queries,
        softmax_scale,
        seqused_k,
        page_table,
    )
    return result


def check_values(op: str, k: Tensor, seqused_k: Tensor | None, page_table: Tensor | None) -> None:
    """The values of the index tensors that k comes with."""
    seqlen_k = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
    _validate.lengths(op, "seqused_k", seqused_k, seqlen_k)
    _validate.pages(op, page_table, seqused_k, k)


def _fake(
    k: Tensor,
    page_size: int,
    method: str = "minmax",
    key_scores: Tensor | None = None,
    num_representative: int = 4,
    queries: Tensor | None = None,
    softmax_scale: float | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    batch, heads, seqlen_k, head_dim = k.shape
    if page_table is not None:
        batch, seqlen_k = page_table.shape[0], page_table.shape[1] * seqlen_k
    for tensor in (key_scores, queries):
        heads = heads if tensor is None else tensor.shape[1]
    extremes = (2,) if method == "minmax" else ()
    return k.new_empty((batch, heads, (seqlen_k + page_size - 1) // page_size, *extremes, head_dim))


register_op("summarize_pages", _fake)
