"""`token_scores` against its float64 twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_accurate, assert_same_bits, record
from longctx.reference.page_scores import reduced
from longctx.reference.token_scores import at_candidates, logits_of, visible_keys
from op_case import DTYPES, Call, generator, int32, qkv
from page_cases import scored_all_options, scored_candidates, scored_pages
from topk_cases import random_indices

HEAD_REDUCE = ("none", "group_mean", "group_max", "group_sum", "all_sum")


def scored(dtype: torch.dtype, **sizes: int) -> Call:
    call = qkv(dtype, **({"seqlen_q": 3} | sizes))
    return {name: call[name] for name in ("q", "k")}


def in_torch(call: Call) -> Tensor:
    """The formula in q's dtype."""
    k, seen = visible_keys(call["q"], call["k"], call.get("seqused_k"), call.get("page_table"))
    scores = logits_of(call["q"], k.nan_to_num(), call.get("softmax_scale"), call.get("softcap", 0.0))
    if call.get("candidates") is not None:
        scores, seen = at_candidates(scores, seen, call["candidates"], k.shape[1])
    return reduced(scores, seen, call.get("head_reduce", "none"), call.get("query_reduce", "none")).float()


def check(call: Call) -> Tensor:
    actual, exact = longctx.token_scores(**call), longctx.reference.token_scores(**call)
    assert (actual.dtype, actual.shape) == (torch.float32, exact.shape)
    hidden = torch.isneginf(exact)
    assert torch.equal(torch.isneginf(actual), hidden), "-inf exactly where no token sees the key"
    backwards = call | {name: call[name].flip(-1) for name in ("q", "k")}
    peers = [in_torch(peer)[~hidden] for peer in (call, backwards)]
    assert_accurate("scores", actual[~hidden], exact[~hidden].double(), *peers)
    record("token_scores", call["q"].dtype, call["q"].shape[3])
    return actual


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [1, 7, 64, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    check(scored(dtype, head_dim=head_dim))


@pytest.mark.sanitize
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (2, 0), (1, 1), (3, 1), (2, 257), (40, 600)])
def test_lengths(isa: str, seqlen_q: int, seqlen_k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"query_reduce": "mean"}, {"query_reduce": "max", "head_reduce": "all_sum"}):
            check(scored(dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k) | options)


@pytest.mark.parametrize("head_reduce", HEAD_REDUCE)
@pytest.mark.parametrize("query_reduce", ["none", "mean", "max"])
def test_reductions(isa: str, head_reduce: str, query_reduce: str) -> None:
    """Of all keys, and of candidates among which some are seen by no token and some by a few."""
    options = {"head_reduce": head_reduce, "query_reduce": query_reduce}
    heads = 2 if head_reduce != "all_sum" else 1
    candidates = random_indices(2, heads, 1, 60, num_blocks=75, seed=3)
    for dtype in DTYPES:
        call = scored(dtype, num_q_heads=6, seqlen_q=7, head_dim=32) | options
        check(call)
        check(call | {"candidates": candidates, "seqused_k": int32(70, 5)})


@pytest.mark.sanitize
@pytest.mark.parametrize("make", [scored_all_options, scored_candidates, scored_pages])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(isa: str, dtype: torch.dtype, make: object) -> None:
    check(make(dtype))  # type: ignore[operator]


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("rows", [1, 3])
def test_candidates_are_entries_of_the_row(isa: str, heads: int, rows: int) -> None:
    """The same bits in any order and however often a key is listed."""
    call = scored(torch.bfloat16, num_q_heads=6, seqlen_k=300)
    candidates = torch.randint(0, 300, (2, heads, rows, 400), generator=generator(4), dtype=torch.int32)
    everything = longctx.token_scores(**call)
    listed = candidates.long().repeat_interleave(6 // heads, dim=1).expand(2, 6, 3, 400)
    assert_same_bits(longctx.token_scores(**call, candidates=candidates), everything.gather(3, listed))


@pytest.mark.parametrize(
    "options", [{"query_reduce": "mean"}, {"head_reduce": "group_max"}, {"head_reduce": "all_sum"}]
)
def test_reductions_refuse_different_candidates(options: Call) -> None:
    call = scored(torch.float32)
    with pytest.raises(ValueError, match=r"^longctx::token_scores: `candidates` must have .* where"):
        longctx.token_scores(**call, candidates=torch.zeros(2, 4, 3, 5, dtype=torch.int32), **options)


@pytest.mark.sanitize
@pytest.mark.parametrize("page_size", [1, 16, 600])
def test_pages_equal_contiguous_keys(isa: str, page_size: int) -> None:
    """The same bits, wherever the pages lie; other pages may hold anything, and keys of missing ones score -inf."""
    call = scored(torch.bfloat16, seqlen_k=600, head_dim=32) | {"seqused_k": int32(600, 401)}
    for b, used in enumerate((600, 401)):
        call["k"][b, :, used:] = torch.nan
    expected = longctx.token_scores(**call)
    max_pages = -(-600 // page_size)
    table = torch.randperm(2 * max_pages + 3, generator=generator(0))[: 2 * max_pages].view(2, max_pages)
    cache = torch.full((2 * max_pages + 3, 2, page_size, 32), torch.nan, dtype=torch.bfloat16)
    padded = torch.nn.functional.pad(call["k"], (0, 0, 0, max_pages * page_size - 600), value=torch.nan)
    cache[table] = padded.unflatten(2, (max_pages, page_size)).transpose(1, 2)
    paged = call | {"k": cache, "page_table": table.int()}
    assert_same_bits(longctx.token_scores(**paged)[..., :600], expected)
    missing = table.int()
    missing[:, -1] = -1
    first = (max_pages - 1) * page_size
    scores = longctx.token_scores(**paged | {"page_table": missing})
    assert torch.isneginf(scores[..., first:]).all()
    assert_same_bits(scores[..., :first], expected[..., :first])


def test_later_keys_and_missing_candidates_are_never_read(isa: str) -> None:
    call = scored(torch.float32, seqlen_q=4, seqlen_k=80)
    expected = longctx.token_scores(**call)
    changed = call | {"k": call["k"].clone()}
    changed["k"][:, :, 78:] = torch.nan
    assert_same_bits(longctx.token_scores(**changed)[:, :, :2], expected[:, :, :2])
    candidates = int32(5, -1, 80, 77, 2**31 - 1, -(2**31)).view(1, 1, 1, 6).expand(2, 1, 1, 6)
    scores = longctx.token_scores(**changed, candidates=candidates)
    assert torch.isneginf(scores[..., [1, 2, 4, 5]]).all()
    assert_same_bits(scores[:, :, 1:, [0, 3]], expected[:, :, 1:, [5, 77]])
