"""Naive twins of `longctx.gather_kv`, `compact_kv`, `truncate_kv` and `append_kv`, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.reference.summarize_pages import update_pages


def row_reader(cache: Tensor, page_table: Tensor | None) -> Callable[[int, int, int], Tensor | None]:
    """`(batch, head, key)` to the row, as a view, or None where its page does not exist."""

    def row(b: int, h: int, key: int) -> Tensor | None:
        if page_table is None:
            return cache[b, h, key]
        page, slot = int(page_table[b, key // cache.shape[2]]), key % cache.shape[2]
        return cache[page, h, slot] if 0 <= page < cache.shape[0] else None

    return row


def used_keys(cache: Tensor, b: int, seqused_k: Tensor | None, page_table: Tensor | None) -> int:
    room = cache.shape[2] if page_table is None else page_table.shape[1] * cache.shape[2]
    return room if seqused_k is None else min(max(int(seqused_k[b]), 0), room)


def counted(entries: list[int], counts: Tensor | None, *where: int) -> list[int]:
    return entries if counts is None else entries[: max(int(counts[where]), 0)]


def gather_kv(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(k_out, v_out)`, a row at a time; see `longctx.gather_kv`."""
    (batch, index_heads, num_entries), heads = indices.shape, k.shape[1]
    outputs = []
    for cache in (k, v):
        row, out = row_reader(cache, page_table), cache.new_zeros(batch, heads, num_entries, cache.shape[3])
        for b in range(batch):
            for h in range(heads):
                head = h * index_heads // heads
                for i, key in enumerate(counted(indices[b, head].tolist(), counts, b, head)):
                    found = row(b, h, key) if 0 <= key < used_keys(cache, b, seqused_k, page_table) else None
                    if found is not None:
                        out[b, h, i] = found
        outputs.append(out)
    return outputs[0], outputs[1]


def existing(cache: Tensor, b: int, page_table: Tensor | None) -> Callable[[int], bool]:
    row = row_reader(cache, page_table)
    return lambda key: row(b, 0, key) is not None


def kept_keys(entries: list[int], first: int, end: int, exists: Callable[[int], bool]) -> list[int]:
    """Of the ascending entries, counted from key `first`, those in [max(first, 0), end) whose page exists."""
    kept: list[int] = []
    for entry in entries:
        key = first + entry
        if entry >= 0 and 0 <= key < end and (not kept or key > kept[-1]) and exists(key):
            kept.append(key)
    return kept


def move_to(caches: Sequence[Tensor], b: int, h: int, first: int, keys: list[int], page_table: Tensor | None) -> None:
    for cache in caches:
        row = row_reader(cache, page_table)
        for i, key in enumerate(keys):
            target, source = row(b, h, first + i), row(b, h, key)
            if target is not None and source is not None:
                target.copy_(source.clone())


def compact_kv(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """The new lengths; moves the rows one by one; see `longctx.compact_kv`."""
    caches = [cache for given in (k_cache, v_cache) for cache in ([given] if isinstance(given, Tensor) else given)]
    (batch, index_heads, _), heads = indices.shape, caches[0].shape[1]
    lengths = indices.new_zeros(batch, index_heads)
    for b in range(batch):
        end = used_keys(caches[0], b, seqused_k, page_table)
        for h in range(heads):
            head = h * index_heads // heads
            entries = counted(indices[b, head].tolist(), counts, b, head)
            keys = kept_keys(entries, 0, end, existing(caches[0], b, page_table))
            lengths[b, head] = len(keys)
            move_to(caches, b, h, 0, keys, page_table)
    return lengths


def truncate_kv(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor],
    seqused_k: Tensor,
    num_draft_tokens: int,
    *,
    accepted: Tensor | None = None,
    counts: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """The new lengths; moves the rows one by one; see `longctx.truncate_kv`."""
    caches = [cache for given in (k_cache, v_cache) for cache in ([given] if isinstance(given, Tensor) else given)]
    lengths = torch.zeros_like(seqused_k)
    for b in range(len(seqused_k)):
        end = used_keys(caches[0], b, seqused_k, page_table)
        first = end - num_draft_tokens
        entries = (
            accepted[b].tolist() if accepted is not None else list(range(num_draft_tokens if counts is not None else 0))
        )
        keys = kept_keys(counted(entries, counts, b), first, end, existing(caches[0], b, page_table))
        lengths[b] = max(first, 0) + len(keys)
        for h in range(caches[0].shape[1]):
            move_to(caches, b, h, max(first, 0), keys, page_table)
    return lengths


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
    summary_method: str = "minmax",
    counts: Tensor | None = None,
) -> Tensor:
    """The new lengths; writes the tokens one by one, then updates the pages; see `longctx.append_kv`."""
    lengths = torch.zeros(k.shape[0], dtype=torch.int32)
    starts = start.tolist() if isinstance(start, Tensor) else [start] * k.shape[0]
    for b, first in enumerate(starts):
        end = used_keys(k_cache, b, None, page_table)
        tokens = counted(list(range(k.shape[2])), counts, b)
        lengths[b] = min(max(first + len(tokens), 0), end)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            row = row_reader(cache, page_table)
            for i in (i for i in tokens if 0 <= first + i < end):
                for h in range(cache.shape[1]):
                    target = row(b, h, first + i)
                    if target is not None:
                        target.copy_(rows[b, h, i])
    if summary is not None:
        update_pages(
            summary, k_cache, start, summary_page_size,
            method=summary_method, seqused_k=lengths.to(k.device), page_table=page_table,
        )  # fmt: skip
    return lengths.to(k.device)
