"""update_pages: summarize_pages for the pages that new keys fall into, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops._register import register_op
from longctx.ops.summarize_pages import SummaryMethod, check_values


def update_pages(
    summary: Tensor,
    k: Tensor,
    start: int | Tensor,
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
) -> None:
    """Brings `summary` up to date after the keys from `start` on have been written to `k`.

    Computes the pages that hold keys at or after `start` and leaves all others alone. With `start` the number of keys
    that `summary` knew, it then has the bits of `summarize_pages` of all keys. Pages behind the last key are not
    touched: begin with the summary of no key (`seqused_k` of 0), or with a larger buffer.

    Args:
        summary: what `summarize_pages` returns, or a buffer with more pages behind; changed. Any strides of its first
            three dims; the others contiguous.
        k: all keys, as for `summarize_pages`.
        start: the first key that is new: a number, or int32 `[batch]` (on a GPU nothing waits for it).
        page_size, method, key_scores, num_representative, queries, softmax_scale, seqused_k, page_table: as for
            `summarize_pages`.
        validate: also check the values of start, seqused_k and page_table (reads them).

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.
        NotImplementedError: summary, k or queries require a gradient, which is not registered for ops that change an
            argument.

    Cost: reads `page_size` keys per head at most, and the new ones: independent of the length. Deterministic, as
    `summarize_pages`. On CUDA one launch.
    Source: Quest (arXiv 2406.10774).

    Example:
        >>> import torch, longctx
        >>> k = torch.randn(1, 2, 100, 64)
        >>> summary = longctx.summarize_pages(k, 16)
        >>> k[:, :, 99] = 7.0  # a cache of 99 keys, and one more
        >>> longctx.update_pages(summary, k, 99, 16)
        >>> torch.equal(summary, longctx.summarize_pages(k, 16))
        True
    """
    if validate:
        check_values("update_pages", k, seqused_k, page_table)
        if isinstance(start, Tensor) and start.numel() > 0 and int(start.min()) < 0:
            raise ValueError(f"longctx::update_pages: `start` must not be negative; got {int(start.min())}")
    tensors = (summary, k, queries)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(
            "longctx::update_pages has no backward: it changes `summary` in place; call it under torch.no_grad()"
        )
    if isinstance(start, Tensor) and start.device != summary.device:
        raise ValueError(f"longctx::update_pages: `start` must be on {summary.device}; got {start.device}")
    first, starts = (0, start) if isinstance(start, Tensor) else (start, None)
    torch.ops.longctx.update_pages(
        summary,
        k,
        first,
        starts,
        page_size,
        method,
        key_scores,
        num_representative,
        queries,
        softmax_scale,
        seqused_k,
        page_table,
    )


def _fake(summary: Tensor, *options: object) -> None:
    return None


register_op("update_pages", _fake, differentiable=False)
