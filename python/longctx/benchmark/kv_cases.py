"""The measured cases of what happens to rows of caches: moved, or clustered."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import longctx
from longctx import reference
from longctx.benchmark.case import BF16, FP32, Case, Contenders


def _caches(length: int, dtype: torch.dtype, layers: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.empty(1, 8, length, 128, dtype=dtype).normal_(generator=generator) for _ in range(2 * layers)]


def _gather_kv(length: int, dtype: torch.dtype) -> Contenders:
    """2048 rows of each head anywhere among `length`; every turn takes others, so that none are in the cache."""
    turns, kept = 16, min(2048, length)
    k, v = _caches(length, dtype, 1)
    order = torch.rand(turns, 1, 8, length, generator=torch.Generator().manual_seed(1))
    chosen = order.topk(kept, dim=-1).indices.sort(dim=-1).values
    entries, rows = chosen.int(), chosen[..., None].expand(-1, -1, -1, -1, 128)
    next_turn = {"longctx": 0, "torch.gather": turns // 2}

    def turn(name: str) -> int:
        next_turn[name] += 1
        return next_turn[name] % turns if kept < length else 0  # the check compares one result

    def torch_gather() -> tuple[Tensor, Tensor]:
        index = rows[turn("torch.gather")]
        return k.gather(2, index), v.gather(2, index)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.gather_kv(k, v, entries[turn("longctx")]),
        "torch.gather": torch_gather,
    }
    return Contenders(run, 0.0, 2 * 2.0 * 8 * kept * 128 * dtype.itemsize)


def _compact_kv(length: int, dtype: torch.dtype) -> Contenders:
    """8 layers: 4 sinks and every other of the remaining keys stay."""
    layers = 8
    kept = torch.cat([torch.arange(4), torch.arange(4, length, 2)])
    indices = kept.int().view(1, 1, -1)
    ours, theirs = ([cache.clone() for cache in caches] for caches in [_caches(length, dtype, layers)] * 2)

    def compact() -> tuple[Tensor, ...]:
        longctx.compact_kv(ours[:layers], ours[layers:], indices)
        return tuple(cache[:, :, : len(kept)] for cache in ours)

    def index_select() -> tuple[Tensor, ...]:
        """Into new tensors, as a cache without rows of its own does."""
        return tuple(cache.index_select(2, kept) for cache in theirs)

    run: dict[str, Callable[[], object]] = {"longctx": compact, "index_select": index_select}
    return Contenders(run, 0.0, 2 * 2.0 * layers * 8 * len(kept) * 128 * dtype.itemsize)


def _append_kv(length: int, dtype: torch.dtype, *, num_new: int = 1) -> Contenders:
    """New keys behind `length` others, whose extremes in pages of 16 follow; every turn takes other keys."""
    page, turns, room = 16, 16, length + num_new
    ours, theirs = ([*_caches(room, dtype, 1)] for _ in range(2))
    summaries = [longctx.summarize_pages(caches[0], page) for caches in (ours, theirs)]
    new = torch.randn(turns, 2, 1, 8, num_new, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    place = torch.arange(length, room)
    used, ends = torch.tensor([length], dtype=torch.int32), torch.tensor([room], dtype=torch.int32)
    next_turn = {"longctx": 0, "index_copy_": 0}

    def rows(name: str) -> Tensor:
        next_turn[name] += 1
        return new[next_turn[name] % turns]

    def append() -> Tensor:
        k, v = rows("longctx")
        longctx.append_kv(ours[0], ours[1], k, v, used, summary=summaries[0], summary_page_size=page)
        return summaries[0][:, :, length // page :]

    def index_copy() -> Tensor:
        for cache, row in zip(theirs, rows("index_copy_"), strict=True):
            cache.index_copy_(2, place, row)
        longctx.update_pages(summaries[1], theirs[0], used, page, seqused_k=ends)
        return summaries[1][:, :, length // page :]

    run: dict[str, Callable[[], object]] = {"longctx": append, "index_copy_, update_pages": index_copy}
    return Contenders(run, 0.0, 8 * 128 * dtype.itemsize * (4.0 * num_new + page))


def _kmeans(length: int, dtype: torch.dtype) -> Contenders:
    """5% of the keys as clusters, 10 iterations, one head; torch starts from random keys, which costs nothing."""
    generator = torch.Generator().manual_seed(0)
    clusters, num_iters = max(1, length // 20), 10
    centres = torch.randn(clusters, 128, generator=generator)
    of = torch.randint(clusters, (length,), generator=generator)
    keys = (centres[of] + 2.0 * torch.randn(length, 128, generator=generator)).to(dtype)
    options = {"num_iters": num_iters, "metric": "euclidean"}

    def torch_kmeans() -> tuple[Tensor, Tensor]:
        points = keys.float()
        means = points[torch.randperm(length, generator=generator)[:clusters]]
        for _ in range(num_iters + 1):
            labels = torch.addmm(-0.5 * means.square().sum(dim=1), points, means.mT).argmax(dim=1)
            sizes = torch.bincount(labels, minlength=clusters)[:, None]
            sums = torch.zeros_like(means).index_add_(0, labels, points)
            means = torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
        return means, labels

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.kmeans(keys[None, None], clusters, **options),  # type: ignore[arg-type]
        "torch": torch_kmeans,
    }
    twin = functools.partial(reference.kmeans, keys[None, None], clusters, **options)  # type: ignore[arg-type]
    products = num_iters + 1  # of the seeding and of each iteration
    return Contenders(run, 2.0 * products * length * clusters * 128, keys.nbytes, exact=twin)


CASES = [
    Case("2048 keys of all, 8 heads, D=128", "gather_kv", 131072, BF16, _gather_kv),
    Case("half of the keys, 8 layers of 8 heads, D=128", "compact_kv", 4096, BF16, _compact_kv),
    Case("one token, 8 heads, D=128, extremes of pages of 16", "append_kv", 32768, BF16, _append_kv),
    Case(
        "2048 tokens, 8 heads, D=128, extremes of pages of 16",
        "append_kv",
        32768,
        BF16,
        functools.partial(_append_kv, num_new=2048),
    ),
    Case("5% clusters, 10 iterations, D=128", "kmeans", 32768, FP32, _kmeans),
    Case("5% clusters, 10 iterations, D=128", "kmeans", 32768, BF16, _kmeans),
]
