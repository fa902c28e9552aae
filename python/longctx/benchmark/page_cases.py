"""The measured cases of summaries and scores of keys, and of a whole decode step with them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import longctx
from longctx import reference
from longctx.benchmark.case import BF16, Case, Contenders, qkv

PAGE = 16


def _summarize(length: int, dtype: torch.dtype) -> Contenders:
    _, k, _ = qkv(length, dtype, 8, 2, 128)

    def torch_extremes() -> Tensor:
        pages = k.unflatten(2, (-1, PAGE))
        return torch.stack([pages.amin(dim=3), pages.amax(dim=3)], dim=3)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.summarize_pages(k, PAGE),
        "torch": torch_extremes,
    }
    return Contenders(run, 0.0, k.nbytes * (1 + 2 / PAGE))


def _page_scores(length: int, dtype: torch.dtype) -> Contenders:
    """The best of a group of query heads, a number for each page of a kv head."""
    q, k, _ = qkv(length, dtype, 8, 2, 128)
    q = q[:, :, -1:].contiguous()
    summary = longctx.summarize_pages(k, PAGE)
    low, high = (summary[:, :, :, i].transpose(2, 3) for i in (0, 1))

    def torch_scores() -> Tensor:
        x = q.unflatten(1, (2, 4))[:, :, :, 0] * 128**-0.5
        return torch.amax(x.clamp(max=0) @ low + x.clamp(min=0) @ high, dim=2, keepdim=True).float()

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.page_scores(q, summary, head_reduce="group_max"),
        "torch": torch_scores,
    }
    twin = functools.partial(reference.page_scores, q, summary, head_reduce="group_max")
    return Contenders(run, 4.0 * 8 * 128 * length / PAGE, summary.nbytes, exact=twin)


def _token_scores(length: int, dtype: torch.dtype) -> Contenders:
    q, k, _ = qkv(length, dtype, 8, 2, 128)
    q = q[:, :, -1:].contiguous()

    def torch_scores() -> Tensor:
        logits: Tensor = q.unflatten(1, (2, 4))[:, :, :, 0] @ k.transpose(2, 3)
        return torch.mul(torch.amax(logits, dim=2, keepdim=True).float(), 128**-0.5)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.token_scores(q, k, head_reduce="group_max"),
        "torch": torch_scores,
    }
    twin = functools.partial(reference.token_scores, q, k, head_reduce="group_max")
    return Contenders(run, 2.0 * 8 * 128 * length, k.nbytes, exact=twin)


def _quest_step(length: int, dtype: torch.dtype) -> Contenders:
    """One token of Quest: it joins cache and page, pages are scored, the best and the last are read: 2048 keys.

    Every turn has another query. Up to 2048 keys it is dense attention.
    """
    budget, turns = 2048, 16
    _, k, v = qkv(length, dtype, 8, 2, 128)
    queries = torch.randn(turns, 1, 8, 1, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    summary = longctx.summarize_pages(k, PAGE)
    new = k[:, :, -1:].clone(), v[:, :, -1:].clone()
    next_turn = {"longctx": 0, "dense": 0}

    def query(name: str) -> Tensor:
        next_turn[name] += 1
        return queries[next_turn[name] % turns]

    def step() -> Tensor:
        q = query("longctx")
        longctx.append_kv(k, v, *new, length - 1, summary=summary, summary_page_size=PAGE)
        scores = longctx.page_scores(q, summary, head_reduce="group_max")
        pages, _ = longctx.topk_select(scores, budget // PAGE - 1)
        return longctx.gather_attention(q, k, v, pages, block_size_k=PAGE, num_last=PAGE)[0]

    run: dict[str, Callable[[], object]] = {
        "longctx": step,
        "dense longctx.attention": lambda: longctx.attention(query("dense"), k, v),
    }
    kept = min(budget, length)
    flops = 4.0 * 8 * 128 * (kept + length / PAGE)
    return Contenders(run, flops, summary.nbytes + 2 * 2 * 128 * kept * float(dtype.itemsize))


CASES = [
    Case("extremes of pages of 16, 2 heads, D=128", "summarize_pages", 131072, BF16, _summarize),
    Case("pages of 16, GQA 8/2, D=128", "page_scores", 131072, BF16, _page_scores),
    Case("GQA 8/2, D=128", "token_scores", 131072, BF16, _token_scores),
    Case(
        "2048 keys by pages of 16, GQA 8/2, D=128",
        "quest_step",
        131072,
        BF16,
        _quest_step,
        {"dense longctx.attention": (6.0, 10.0)},
    ),
]
