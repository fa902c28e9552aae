"""`summarize_pages` and `update_pages` against their float64 twins."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES
from checks import assert_accurate, assert_same_bits, record
from op_case import DTYPES, Call, generator, int32, qkv, randn
from page_cases import extremes, keys, pooled_pages, representatives

METHODS = ("minmax", "mean", "representative", "pooled")


def summarized(dtype: torch.dtype, method: str, *, page_size: int = 16, heads: int = 2, seed: int = 0,
               **sizes: int) -> Call:  # fmt: skip
    call = keys(dtype, seed=seed, **sizes) | {"page_size": page_size, "method": method}
    batch, _, seqlen_k, head_dim = call["k"].shape
    if method == "representative":
        call["key_scores"] = randn(batch, heads, seqlen_k, seed=seed + 7)
    if method == "pooled":
        call["queries"] = randn(batch, heads, -(-seqlen_k // page_size), head_dim, dtype=dtype, seed=seed + 8)
    return call


def in_torch(call: Call) -> Tensor:
    """The formula in k's dtype, by matmuls and means of torch, page by page; every key is used."""
    k, size = call["k"], call["page_size"]
    scores, queries = call.get("key_scores"), call.get("queries")
    heads = next((x.shape[1] for x in (scores, queries) if x is not None), k.shape[1])
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scale = call.get("softmax_scale") or k.shape[3] ** -0.5
    rows = []
    for p, page in enumerate(k.split(size, dim=2)):
        if scores is not None:
            order = scores[:, :, p * size : (p + 1) * size].sort(dim=-1, descending=True, stable=True).indices
            best = order[..., : call.get("num_representative", 4), None]
            page = page.gather(2, best.expand(*best.shape[:3], page.shape[3]))
        if queries is not None:
            weights = torch.softmax(scale * (page @ queries[:, :, p, :, None]), dim=2)
            rows.append((weights.transpose(2, 3) @ page)[:, :, 0])
        else:
            rows.append(page.mean(dim=2))
    return torch.stack(rows, dim=2) if rows else k.new_zeros(*k.shape[:2], 0, k.shape[3])


def check(call: Call, *, op: str = "summarize_pages") -> Tensor:
    """Minima and maxima have the twin's bits; the rest is as accurate as torch."""
    actual, exact = longctx.summarize_pages(**call), longctx.reference.summarize_pages(**call)
    if call.get("method", "minmax") == "minmax":
        assert_same_bits(actual, exact)
    else:
        wide = {name: x.double() for name, x in call.items() if name in ("k", "queries")}
        assert (actual.dtype, actual.shape) == (exact.dtype, exact.shape)
        if "seqused_k" not in call and call["k"].dtype != torch.float64 and call["k"].shape[2] > 0:
            assert_accurate("summary", actual, longctx.reference.summarize_pages(**call | wide), in_torch(call))
        torch.testing.assert_close(actual, exact)
    record(op, call["k"].dtype, call["k"].shape[3])
    return actual


@pytest.mark.sanitize
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head_dim", [1, 7, 64, 128, 300])
def test_head_dims(isa: str, head_dim: int, method: str) -> None:
    for dtype in DTYPES:
        check(summarized(dtype, method, batch=1, head_dim=head_dim, seqlen_k=53))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("seqlen_k", "page_size"), [(0, 4), (1, 4), (5, 1), (7, 8), (33, 16), (700, 600), (3, 2**20)])
def test_lengths_and_page_sizes(isa: str, seqlen_k: int, page_size: int, method: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(summarized(dtype, method, seqlen_k=seqlen_k, page_size=page_size))


@pytest.mark.parametrize("method", ["representative", "pooled"])
@pytest.mark.parametrize("heads", [2, 6])
def test_query_heads_choose_for_themselves(isa: str, heads: int, method: str) -> None:
    check(summarized(torch.float32, method, heads=heads, num_kv_heads=2))


@pytest.mark.sanitize
@pytest.mark.parametrize("make", [representatives, pooled_pages])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(isa: str, dtype: torch.dtype, make: object) -> None:
    check(make(dtype))  # type: ignore[operator]


@pytest.mark.sanitize
@pytest.mark.parametrize("method", METHODS)
def test_pages_without_keys(isa: str, method: str) -> None:
    """A static cache of which nothing, part of a page and part of the pages is used; the rest may hold anything."""
    call = summarized(torch.bfloat16, method, batch=3, seqlen_k=70)
    for b, used in enumerate((0, 5, 40)):
        call["k"][b, :, used:] = torch.nan
    summary = check(call | {"seqused_k": int32(0, 5, 40)})
    for b, pages in enumerate((0, 1, 3)):
        nothing = [torch.inf, -torch.inf] if method == "minmax" else [0.0]
        rest = summary[b, :, pages:]
        assert torch.equal(rest, rest.new_tensor(nothing)[:, None].squeeze(0).expand_as(rest))
        assert summary[b, :, :pages].isfinite().all()


def test_order_of_representative_keys(isa: str) -> None:
    """Ties go to the earlier key, NaN comes last."""
    k = torch.arange(6.0).view(1, 1, 6, 1)
    scores = torch.tensor([1.0, torch.nan, 2.0, 1.0, -torch.inf, 2.0]).view(1, 1, 6)
    for number, mean in ((1, 2.0), (2, 3.5), (3, 7 / 3), (5, 14 / 5), (9, 2.5)):
        options = {"key_scores": scores, "num_representative": number}
        summary = longctx.summarize_pages(k, 6, method="representative", **options)
        assert summary.item() == pytest.approx(mean)


def test_nan_is_left_out_of_extremes(isa: str) -> None:
    for dtype in DTYPES:
        call = extremes(dtype)
        call["k"][:, :, ::3, ::2] = torch.nan
        assert check(call).isfinite().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("cache_page_size", "page_size"), [(8, 24), (24, 8), (5, 16)])
def test_pages_of_a_cache(isa: str, cache_page_size: int, page_size: int, method: str) -> None:
    """The bits of contiguous keys, wherever the pages lie; keys of missing pages are skipped."""
    call = summarized(torch.bfloat16, method, seqlen_k=120, page_size=page_size) | {"seqused_k": int32(120, 51)}
    expected = longctx.summarize_pages(**call)
    pages = call["k"].unflatten(2, (-1, cache_page_size)).transpose(1, 2).flatten(0, 1)
    table = torch.randperm(len(pages), generator=generator(5))
    cache = torch.empty_like(pages)
    cache[table] = pages
    paged = call | {"k": cache, "page_table": table.view(2, -1).int()}
    assert_same_bits(longctx.summarize_pages(**paged), expected)
    missing = paged["page_table"].clone()
    missing[0, 1], missing[1, 2] = -1, len(pages)
    check(paged | {"page_table": missing})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("page_size", [1, 6, 130])
def test_update_gives_the_bits_of_a_new_start(isa: str, page_size: int, method: str) -> None:
    """Keys that come by one and by many, in a static cache of ragged sequences and in one that grows."""
    for dtype in (torch.float32, torch.bfloat16) if page_size > 1 else (torch.bfloat16,):
        call = summarized(dtype, method, seqlen_k=75, page_size=page_size)
        static = longctx.summarize_pages(**call, seqused_k=int32(0, 0))
        growing = torch.full_like(static, 9.0)
        used = int32(0, 0)
        for step in ((1, 7), (1, 1), (0, 20), (40, 1), (3, 11)):
            start, used = used, used + int32(*step)
            before = static.clone()
            longctx.update_pages(static, start=start, seqused_k=used, **call)
            assert_same_bits(static, longctx.summarize_pages(**call, seqused_k=used))
            for b in range(2):
                old = slice(0, int(start[b]) // page_size)
                assert torch.equal(static[b, :, old], before[b, :, old])
        for end in (11, 12, 23, 24):
            keys_now = {"k": call["k"][:, :, :end]}
            if method == "representative":
                keys_now["key_scores"] = call["key_scores"][:, :, :end]
            if method == "pooled":
                keys_now["queries"] = call["queries"][:, :, : -(-end // page_size)]
            longctx.update_pages(growing, start=max(0, end - 11), **call | keys_now)
            pages = -(-end // page_size)
            assert_same_bits(growing[:, :, :pages], longctx.summarize_pages(**call | keys_now))
            assert (growing[:, :, pages:] == 9.0).all()
        record("update_pages", dtype, call["k"].shape[3])


def test_update_of_a_strided_summary(isa: str) -> None:
    call = extremes(torch.bfloat16)
    wide = torch.zeros(2, 9, 4, 2, 16, dtype=torch.bfloat16)
    view = wide.transpose(1, 2)[:, 1:3, 2:8]  # [batch, heads, pages, 2, head_dim]
    longctx.update_pages(view, start=0, **call)
    assert_same_bits(view[:, :, :5], longctx.summarize_pages(**call))
    view.zero_()
    assert not wide.any(), "nothing else was written"
    with pytest.raises(ValueError, match="last two dims"):
        longctx.update_pages(torch.zeros(2, 2, 5, 3, 16, dtype=torch.bfloat16)[:, :, :, ::2], start=0, **call)


def test_update_refuses_gradients() -> None:
    call = CASES["update_pages"].calls["plain"](torch.float32)
    call["k"].requires_grad_()
    with pytest.raises(NotImplementedError, match="longctx::update_pages"):
        longctx.update_pages(**call)


@pytest.mark.parametrize("dim", range(3))
def test_addresses_beyond_32_bits(dim: int) -> None:
    """Batch entries, heads or rows farther apart than 2^31 elements; pages that nobody touches cost no memory."""
    k = qkv(torch.bfloat16, seqlen_k=2)["k"]
    strides = list(k.stride())
    strides[dim] = 2**31 + 64
    size = 2 * (2 * strides[dim] + k.numel())
    storage = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    far = torch.frombuffer(storage, dtype=torch.bfloat16).as_strided(k.shape, strides).copy_(k)
    assert_same_bits(longctx.summarize_pages(far, 2), longctx.summarize_pages(k, 2))
