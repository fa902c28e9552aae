"""`page_scores` against its float64 twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_accurate, record
from longctx.reference.page_scores import reduced, scores_of, visible_pages
from op_case import DTYPES, Call, generator, int32, qkv, randn
from page_cases import clusters, page_bounds, page_shares

HEAD_REDUCE = ("none", "group_mean", "group_max", "group_sum", "all_sum")
QUERY_REDUCE = ("none", "mean", "max")


def scored(dtype: torch.dtype, *, method: str = "minmax", seqlen_q: int = 3, num_pages: int = 21, num_q_heads: int = 4,
           heads: int = 2, head_dim: int = 16, seed: int = 0) -> Call:  # fmt: skip
    summary = randn(2, heads, num_pages, 2, head_dim, dtype=dtype, seed=seed + 1).sort(dim=3).values
    return {
        "q": randn(2, num_q_heads, seqlen_q, head_dim, dtype=dtype, seed=seed),
        "summary": summary if method == "minmax" else summary[:, :, :, 0].contiguous(),
        "method": method,
    }


def in_torch(call: Call) -> Tensor:
    """The formula in q's dtype."""
    options = {"method": "minmax", "counts": None, "seqused_k": None, "page_size": None} | call
    seen = visible_pages(*(options[x] for x in ("q", "summary", "method", "counts", "seqused_k", "page_size")))
    scores = scores_of(
        options["q"],
        options["summary"],
        seen,
        options["method"],
        options.get("softmax", False),
        options["counts"],
        options.get("softmax_scale"),
    )
    return reduced(scores, seen, options.get("head_reduce", "none"), options.get("query_reduce", "none")).float()


def check(call: Call) -> Tensor:
    actual, exact = longctx.page_scores(**call), longctx.reference.page_scores(**call)
    assert (actual.dtype, actual.shape) == (torch.float32, exact.shape)
    hidden = torch.isneginf(exact)
    assert torch.equal(torch.isneginf(actual), hidden), "-inf exactly where no token sees the page"
    backwards = call | {name: call[name].flip(-1) for name in ("q", "summary")}
    peers = [in_torch(peer)[~hidden] for peer in (call, backwards)]
    assert_accurate("scores", actual[~hidden], exact[~hidden].double(), *peers)
    record("page_scores", call["q"].dtype, call["q"].shape[3])
    return actual


@pytest.mark.parametrize("head_dim", [1, 7, 64, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    for method in ("minmax", "dot"):
        check(scored(dtype, method=method, head_dim=head_dim))


@pytest.mark.parametrize(("num_q_heads", "heads"), [(1, 1), (2, 1), (6, 2), (9, 1), (40, 1), (3, 3)])
def test_heads(isa: str, num_q_heads: int, heads: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(scored(dtype, num_q_heads=num_q_heads, heads=heads))
        check(scored(dtype, num_q_heads=num_q_heads, heads=heads) | {"head_reduce": "group_mean"})


@pytest.mark.sanitize
@pytest.mark.parametrize(("seqlen_q", "num_pages"), [(0, 5), (1, 0), (1, 1), (3, 17), (1, 600), (20, 257)])
def test_lengths(isa: str, seqlen_q: int, num_pages: int) -> None:
    for options in ({}, {"query_reduce": "mean"}, {"query_reduce": "max", "head_reduce": "all_sum"}):
        check(scored(torch.float32, seqlen_q=seqlen_q, num_pages=num_pages) | options)


@pytest.mark.parametrize("head_reduce", HEAD_REDUCE)
@pytest.mark.parametrize("query_reduce", QUERY_REDUCE)
@pytest.mark.parametrize("softmax", [False, True])
def test_reductions(isa: str, head_reduce: str, query_reduce: str, softmax: bool) -> None:
    """Also of pages that only later tokens see, and of a batch entry with fewer keys than tokens."""
    options = {"head_reduce": head_reduce, "query_reduce": query_reduce, "softmax": softmax}
    for dtype in DTYPES:
        check(scored(dtype) | options)
        check(scored(dtype, seqlen_q=7) | options | {"seqused_k": int32(40, 5), "page_size": 2})


@pytest.mark.sanitize
@pytest.mark.parametrize("make", [page_bounds, page_shares, clusters])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(isa: str, dtype: torch.dtype, make: object) -> None:
    check(make(dtype))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_key_exceeds_the_bound_of_its_page(isa: str, dtype: torch.dtype) -> None:
    call = qkv(dtype, seqlen_q=3, seqlen_k=100, head_dim=64)
    for scale in (0.3, -0.3):
        scores = longctx.page_scores(call["q"], longctx.summarize_pages(call["k"], 16), softmax_scale=scale)
        logits = scale * call["q"].double() @ call["k"].double().repeat_interleave(2, dim=1).transpose(2, 3)
        bounds = scores.repeat_interleave(16, dim=3)[..., :100].double()
        assert (logits <= bounds + 1e-5).all()
    single = longctx.page_scores(call["q"], longctx.summarize_pages(call["k"], 1), softmax_scale=scale)
    torch.testing.assert_close(single, logits.float())


def test_softmax_counts_every_key(isa: str) -> None:
    """Shares of clusters, times their keys, add up to 1; counts of 1 change nothing."""
    call = scored(torch.float32, method="dot", num_pages=6)
    counts = torch.randint(1, 5, (2, 2, 6), generator=generator(3), dtype=torch.int32)
    shares = longctx.page_scores(**call, softmax=True, counts=counts)
    total = (shares * counts.repeat_interleave(2, dim=1)[:, :, None]).sum(dim=-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    ones = torch.ones_like(counts)
    alone = longctx.page_scores(**call, softmax=True)
    assert torch.equal(longctx.page_scores(**call, softmax=True, counts=ones), alone)
    torch.testing.assert_close(alone, torch.softmax(longctx.page_scores(**call), dim=-1))


@pytest.mark.parametrize("scale", [300.0, -300.0, 1e30])
def test_large_logits_neither_overflow_nor_underflow(isa: str, scale: float) -> None:
    shares = longctx.page_scores(**scored(torch.float32, method="dot"), softmax=True, softmax_scale=scale)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, 4, 3))


def test_nan_of_a_page_stays_there(isa: str) -> None:
    call = scored(torch.bfloat16, num_pages=70)
    expected = longctx.page_scores(**call)
    call["summary"][:, :, 5, :, 3] = torch.nan
    actual = longctx.page_scores(**call)
    assert actual[..., 5].isnan().all()
    others = [p for p in range(70) if p != 5]
    assert torch.equal(actual[..., others], expected[..., others])


@pytest.mark.sanitize
@pytest.mark.parametrize("method", ["minmax", "dot"])
def test_what_no_token_sees_is_not_read(isa: str, method: str) -> None:
    """Pages behind the last key may hold anything; a row of a larger buffer is a view."""
    call = scored(torch.bfloat16, method=method, num_pages=300) | {"seqused_k": int32(4 * 290 - 1, 9), "page_size": 4}
    buffer = torch.full((2, 2, 330, *call["summary"].shape[3:]), torch.nan, dtype=torch.bfloat16)
    for b, pages in enumerate((290, 3)):
        buffer[b, :, 10 : 10 + pages] = call["summary"][b, :, :pages]
    view = call | {"summary": buffer[:, :, 10:310]}
    for options in ({}, {"softmax": True, "query_reduce": "mean", "head_reduce": "group_sum"}):
        assert torch.equal(longctx.page_scores(**view | options), check(call | options))
