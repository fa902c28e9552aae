"""The measured cases of top-k KV and of dense decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import longctx
from longctx import reference
from longctx.benchmark.case import BF16, FP32, Case, Contenders, attention_work, partial, qkv
from longctx.cache.huge_pages import on_huge_pages


def _decode(length: int, dtype: torch.dtype, *, kv_heads: int) -> Contenders:
    """One query token that sees every key."""
    q, k, v = qkv(length, dtype, 8, kv_heads, 128)
    q = q[:, :, -1:].contiguous()
    flops, nbytes = attention_work(q, k, length)
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.attention(q, k, v),
        "sdpa": functools.partial(scaled_dot_product_attention, q, k, v, enable_gqa=kv_heads != 8),
    }
    return Contenders(run, flops, nbytes)


def _gather(length: int, dtype: torch.dtype, huge_pages: bool) -> Contenders:
    """2048 keys anywhere among `length`; every turn takes other keys, so that none are in the cache."""
    kv_heads, turns, kept = 2, 24, min(2048, length)
    q = torch.randn(1, 8, 1, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    k, v = (torch.empty(1, kv_heads, length, 128, dtype=dtype) for _ in range(2))
    for cache in (k, v):
        (on_huge_pages(cache) if huge_pages else cache).normal_()
    order = torch.rand(turns, kv_heads, length, generator=torch.Generator().manual_seed(1))
    chosen = order.topk(kept, dim=-1).indices.sort(dim=-1).values
    entries = chosen.int()[:, None, :, None]
    next_turn = {"longctx": 0, "index_select": turns // 2}

    def turn(name: str) -> int:
        if kept == length:  # the check compares one result
            return 0
        next_turn[name] += 1
        return next_turn[name] % turns

    def select(rows: Tensor, keys: Tensor) -> Tensor:
        return torch.stack([rows[0, h].index_select(0, keys[h]) for h in range(kv_heads)])[None]

    def torch_gather() -> Tensor:
        keys = chosen[turn("index_select")]
        return scaled_dot_product_attention(q, select(k, keys), select(v, keys), enable_gqa=True)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.gather_attention(q, k, v, entries[turn("longctx")]),
        "index_select + sdpa": torch_gather,
    }
    return Contenders(run, 4.0 * 8 * 128 * kept, kept * kv_heads * 2.0 * 128 * dtype.itemsize)


def _score_rows(length: int, dtype: torch.dtype, rows: str) -> Tensor:
    scores = torch.randn(8, length, generator=torch.Generator().manual_seed(0))
    made = {
        "random": lambda: scores,
        "ascending": lambda: scores.sort(dim=-1).values,
        "descending": lambda: scores.sort(dim=-1, descending=True).values,
        "constant": lambda: torch.ones_like(scores),
        "16 values": lambda: (4 * scores).round().clamp(-8, 7),
    }[rows]()
    return made.to(dtype)


def _topk_select(length: int, dtype: torch.dtype, *, rows: str) -> Contenders:
    """The twin sorts each row; torch.topk breaks ties as it likes."""
    scores = _score_rows(length, dtype, rows)
    k = min(2048, length // 4)
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.topk_select(scores, k),
        "torch.topk": lambda: torch.topk(scores, k),
    }
    return Contenders(run, 0.0, scores.nbytes, exact=functools.partial(reference.topk_select, scores, k))


def _threshold_select(length: int, dtype: torch.dtype, *, method: str) -> Contenders:
    """At most 4096 of each row: those above 2.5, or those that hold half of the softmax."""
    scores = _score_rows(length, dtype, "random")
    scores = scores if method == "threshold" else 4 * scores
    value, max_k = (2.5, 4096) if method == "threshold" else (0.5, 4096)

    def torch_threshold() -> Tensor:
        return (scores >= value).nonzero()

    def torch_cumulative() -> tuple[Tensor, Tensor]:
        weights, order = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        return order, (weights.cumsum(-1) - weights < value).sum(-1)

    options = {"value": value, "method": method, "max_k": max_k}
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.threshold_select(scores, **options),  # type: ignore[arg-type]
        "torch": torch_threshold if method == "threshold" else torch_cumulative,
    }
    twin = functools.partial(reference.threshold_select, scores, **options)  # type: ignore[arg-type]
    return Contenders(run, 0.0, scores.nbytes, exact=twin)


CASES = [
    Case("decoding, GQA 8/2, D=128", "attention", 131072, BF16, partial(_decode, kv_heads=2), {"sdpa": (2.3, 3.5)}),
    Case("decoding, 8/8, D=128", "attention", 131072, BF16, partial(_decode, kv_heads=8), {"sdpa": (0.95, 1.2)}),
    *(
        Case(
            f"2048 keys of all, GQA 8/2, D=128, {pages}",
            "gather_attention",
            1 << 20,
            BF16,
            partial(_gather, huge_pages=huge_pages),
            {"index_select + sdpa": (1.5, 2.5)},
        )
        for pages, huge_pages in (("pages of 4 KiB", False), ("pages of 2 MiB, as in longctx.cache", True))
    ),
    *(
        Case(
            f"2048, 8 rows, {rows}",
            "topk_select",
            length,
            FP32,
            partial(_topk_select, rows=rows),
            {"torch.topk": goal},
        )
        for length, random_goal in ((1 << 20, (5.0, 9.0)), (1 << 17, (5.0, 8.0)))
        for rows, goal in (
            ("random", random_goal),
            ("ascending", (2.0, 5.0)),
            ("descending", (2.0, 5.0)),
            ("constant", (2.0, 5.0)),
            ("16 values", (2.0, 5.0)),
        )
    ),
    Case("2048, 8 rows, random", "topk_select", 1 << 20, BF16, partial(_topk_select, rows="random")),
    Case("above 2.5, 8 rows", "threshold_select", 1 << 17, FP32, partial(_threshold_select, method="threshold")),
    Case(
        "half of the softmax, 8 rows",
        "threshold_select",
        1 << 17,
        FP32,
        partial(_threshold_select, method="cumulative"),
    ),
]
