"""append_kv: new keys and values into a cache, and into the summary of its pages, in place."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._register import register_op


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    start: int | Tensor,
    *,
    page_table: Tensor | None = None,
    summary: Tensor | None = None,
    summary_page_size: int = 0,
    summary_method: Literal["minmax", "mean"] = "minmax",
    counts: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Writes new tokens into a cache, brings the summary of its pages up to date, and returns the new lengths.

    Token `i` of batch entry `b` becomes key `start[b] + i`. With `summary` it is as if `update_pages` followed, to the
    bit: the pages that new keys fall into are computed anew from all their keys, the others are left alone. So a
    decode step over pages is `append_kv`, `page_scores`, `topk_select` and `gather_attention`.

    Tokens past `counts`, at negative keys, behind the last row of the cache or on a page that does not exist are not
    written.

    Args:
        k_cache: `[batch, num_kv_heads, seqlen_k, head_dim]`, float32, float64 (CPU), bfloat16 or float16; any strides
            with a contiguous last dim, as for the others. With `page_table`: `[num_pages, num_kv_heads, page_size,
            head_dim]`. **Changed in place.**
        v_cache: `[batch, num_kv_heads, seqlen_k, head_dim_v]`, or in pages. **Changed in place.**
        k: `[batch, num_kv_heads, num_new, head_dim]` in the dtype of the cache; in another storage than the caches.
        v: `[batch, num_kv_heads, num_new, head_dim_v]`.
        start: where the first new token goes, the number of keys so far: a number, or int32 `[batch]` (on a GPU nothing
            waits for it).
        page_table: int32 `[batch, max_pages]`: key `j` is row `j % page_size` of page `page_table[b, j // page_size]`.
            No page that changes may belong to two batch entries.
        summary: of the keys before `start`, or a buffer with more pages behind, as for `update_pages`: `[batch,
            num_kv_heads, num_pages, 2, head_dim]` (`"minmax"`) or `[batch, num_kv_heads, num_pages, head_dim]`
            (`"mean"`). **Changed in place.**
        summary_page_size: keys of a page of `summary`, 1 to `2**20`, independent of the pages of the cache.
        summary_method: ``"minmax"`` or ``"mean"``. The other methods of `update_pages` need more than keys.
        counts: int32 `[batch]`: how many of the new tokens are real. `None`: all.
        validate: also check the values of start, counts and page_table (reads them), and the storages.

    Returns:
        int32 `[batch]`: the number of keys of each batch entry, `start + counts`, at most what there is room for: the
        next `seqused_k` and the next `start`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given, and nothing has
            changed. A `start` that is a number and leaves no room is wrong; of a tensor, `validate` says so.
        NotImplementedError: an argument requires a gradient.

    Cost: each new row is read and written once, and up to `summary_page_size` keys per head are read: independent of
    the length. Nothing is copied to the host. On CUDA one launch. Deterministic.
    Gradients: none (raises NotImplementedError).
    Source: the paged caches of vLLM (arXiv 2309.06180) and the page bounds of Quest (arXiv 2406.10774).

    Example:
        >>> import torch, longctx
        >>> k_cache, v_cache = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 24)  # room for 64 keys
        >>> summary = torch.zeros(1, 2, 4, 2, 16)
        >>> pages = {"summary": summary, "summary_page_size": 16}
        >>> used = longctx.append_kv(k_cache, v_cache, torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 24), 0, **pages)
        >>> longctx.append_kv(k_cache, v_cache, torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 24), used, **pages)
        tensor([41], dtype=torch.int32)
        >>> torch.equal(summary[:, :, :3], longctx.summarize_pages(k_cache[:, :, :41], 16))
        True
    """
    if validate:
        _check_values(k_cache, v_cache, k, v, start, page_table, counts)
    tensors = (k_cache, v_cache, k, v, summary)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(
            "longctx::append_kv has no backward: it changes the caches in place; call it under torch.no_grad()"
        )
    if isinstance(start, Tensor) and start.device != k_cache.device:
        raise ValueError(f"longctx::append_kv: `start` must be on {k_cache.device}; got {start.device}")
    first, starts = (0, start) if isinstance(start, Tensor) else (start, None)
    lengths: Tensor = torch.ops.longctx.append_kv(
        k_cache, v_cache, k, v, first, starts, page_table, summary, summary_page_size, summary_method, counts
    )
    return lengths


def _check_values(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    start: int | Tensor,
    page_table: Tensor | None,
    counts: Tensor | None,
) -> None:
    room = k_cache.shape[2] if page_table is None else page_table.shape[1] * k_cache.shape[2]
    _validate.counts("append_kv", "counts", counts, k.shape[2])
    starts = start if isinstance(start, Tensor) else torch.full((k.shape[0],), start, device=k.device)
    ends = starts + (k.shape[2] if counts is None else counts)
    _validate.lengths("append_kv", "start", starts, room)
    _validate.lengths("append_kv", "start", ends, room)
    _validate.pages("append_kv", page_table, ends, k_cache)
    for name, rows in (("k", k), ("v", v)):
        for cache in (k_cache, v_cache):
            if rows.numel() > 0 and rows.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr():
                raise ValueError(
                    f"longctx::append_kv: `{name}` must not lie in the storage of a cache; got one that does"
                )


def _fake(k_cache: Tensor, v_cache: Tensor, k: Tensor, *options: object) -> Tensor:
    return k.new_empty((k.shape[0],), dtype=torch.int32)


register_op("append_kv", _fake, differentiable=False)
