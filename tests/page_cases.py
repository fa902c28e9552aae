"""Valid calls of the ops that score keys and pages of keys, and what is illegal about their arguments."""

from __future__ import annotations

import torch

from op_case import (
    EXTREME_OPTIONS,
    ILLEGAL_OPTIONS,
    INT64_MAX,
    Call,
    Invalid,
    OpCase,
    generator,
    int32,
    qkv,
    randn,
)
from topk_cases import random_indices


def keys(dtype: torch.dtype, **sizes: int) -> Call:
    return {"k": qkv(dtype, **sizes)["k"]}


def extremes(dtype: torch.dtype) -> Call:
    return keys(dtype) | {"page_size": 16}


def representatives(dtype: torch.dtype) -> Call:
    """A static cache, keys chosen by query heads for themselves, with ties and -inf among the scores."""
    scores = (4 * randn(2, 4, 75, seed=91)).round()
    scores[..., 3::9] = -torch.inf
    options = {"page_size": 16, "method": "representative", "num_representative": 3, "seqused_k": int32(75, 41)}
    return keys(dtype, seed=90) | options | {"key_scores": scores}


def pooled_pages(dtype: torch.dtype) -> Call:
    """Summaries of 16 keys out of cache pages of 8."""
    queries = randn(2, 6, 7, 16, dtype=dtype, seed=93)
    return keys(dtype, batch=31, num_kv_heads=3, seqlen_k=8, seed=92) | {
        "page_size": 16,
        "method": "pooled",
        "queries": queries,
        "softmax_scale": 0.7,
        "seqused_k": int32(75, 110),
        "page_table": torch.randperm(31, generator=generator(94))[:28].view(2, 14).int(),
    }


def new_extremes(dtype: torch.dtype) -> Call:
    return {"summary": randn(2, 2, 5, 2, 16, dtype=dtype, seed=95), "start": 40} | extremes(dtype)


def new_representatives(dtype: torch.dtype) -> Call:
    return {"summary": randn(2, 4, 5, 16, dtype=dtype, seed=96), "start": int32(33, 0)} | representatives(dtype)


def new_pooled_pages(dtype: torch.dtype) -> Call:
    return {"summary": randn(2, 6, 7, 16, dtype=dtype, seed=97), "start": int32(75, 64)} | pooled_pages(dtype)


def page_bounds(dtype: torch.dtype) -> Call:
    """Extremes of pages, of which one has no key."""
    summary = randn(2, 2, 5, 2, 16, dtype=dtype, seed=98).sort(dim=3).values
    summary[1, :, 3, 0], summary[1, :, 3, 1] = torch.inf, -torch.inf
    return {"q": randn(2, 4, 3, 16, dtype=dtype, seed=99), "summary": summary}


def page_shares(dtype: torch.dtype) -> Call:
    """Shares of a softmax over means of pages, some of them without keys, some after the first tokens."""
    counts = torch.randint(0, 4, (2, 3, 6), generator=generator(102), dtype=torch.int32)
    return {
        "q": randn(2, 6, 4, 16, dtype=dtype, seed=100),
        "summary": randn(2, 3, 6, 16, dtype=dtype, seed=101),
        "method": "dot",
        "head_reduce": "group_mean",
        "query_reduce": "mean",
        "softmax": True,
        "counts": counts,
        "softmax_scale": 0.6,
        "seqused_k": int32(48, 26),
        "page_size": 8,
    }


def clusters(dtype: torch.dtype) -> Call:
    q = randn(2, 6, 4, 16, dtype=dtype, seed=103)
    summary = randn(2, 6, 300, 16, dtype=dtype, seed=104)
    return {"q": q, "summary": summary, "method": "dot", "head_reduce": "all_sum", "query_reduce": "max"}


def scored_keys(dtype: torch.dtype) -> Call:
    call = qkv(dtype, seqlen_q=3, seed=105)
    return {name: call[name] for name in ("q", "k")}


def scored_all_options(dtype: torch.dtype) -> Call:
    call = qkv(dtype, num_q_heads=6, num_kv_heads=3, seqlen_q=5, seqlen_k=300, seed=106)
    return {name: call[name] for name in ("q", "k")} | {
        "head_reduce": "group_max",
        "query_reduce": "mean",
        "softmax_scale": 0.3,
        "softcap": 3.0,
        "seqused_k": int32(300, 3),
    }


def scored_candidates(dtype: torch.dtype) -> Call:
    """Of each query head and token its own."""
    candidates = random_indices(2, 4, 3, 40, num_blocks=75, seed=107)
    return scored_keys(dtype) | {"candidates": candidates, "softmax_scale": 0.5}


def scored_pages(dtype: torch.dtype) -> Call:
    call = qkv(dtype, batch=15, num_q_heads=6, num_kv_heads=3, seqlen_q=4, seqlen_k=16, seed=108)
    return {
        "q": call["q"][:2].contiguous(),
        "k": call["k"],
        "head_reduce": "all_sum",
        "query_reduce": "mean",
        "candidates": random_indices(2, 1, 1, 90, num_blocks=112, seed=109),
        "seqused_k": int32(75, 110),
        "page_table": torch.randperm(15, generator=generator(110))[:14].view(2, 7).int(),
    }


SUMMARY_ILLEGAL = {
    "page_size": (0, -16, 2**20 + 1, INT64_MAX),
    "method": ("max", ""),
    "num_representative": (0, -1),
    "softmax_scale": ILLEGAL_OPTIONS["softmax_scale"],
}
SUMMARY_EXTREME = {"num_representative": (1, 16, INT64_MAX), "softmax_scale": (0.0,)}
SUMMARY_INVALID = {
    "seqused_k past the keys": Invalid("all_options", "seqused_k", int32(75, 76)),
    "seqused_k negative": Invalid("all_options", "seqused_k", int32(-1, 75)),
    "page_table past the pages": Invalid("paged", "page_table", torch.full((2, 14), 31).int()),
    "page_table negative": Invalid("paged", "page_table", torch.full((2, 14), -1).int()),
}
PAGED_CHANGES = frozenset(f"paged: k{change}" for change in (".size(0)+1", ".size(0)=0", " huge in its first dim"))
REDUCE_ILLEGAL = {"head_reduce": ("group", ""), "query_reduce": ("sum", "")}

CASES = (
    OpCase(
        name="summarize_pages",
        calls={"plain": extremes, "all_options": representatives, "paged": pooled_pages},
        illegal=SUMMARY_ILLEGAL,
        extreme=SUMMARY_EXTREME | {"page_size": (1, 7, 2**20)},
        legal_changes=PAGED_CHANGES
        | {"all_options: k.size(3)+1"}
        | {f"all_options: k of dtype {dtype}" for dtype in (torch.float64, torch.bfloat16)},
        growing={"k": 2},
        invalid=SUMMARY_INVALID,
        differentiable=("k",),
    ),
    OpCase(
        name="update_pages",
        calls={"plain": new_extremes, "all_options": new_representatives, "paged": new_pooled_pages},
        illegal=SUMMARY_ILLEGAL | {"start": (-1, -INT64_MAX)},
        extreme=SUMMARY_EXTREME | {"start": (0, 80, INT64_MAX)},
        legal_changes=PAGED_CHANGES | {f"{variant}: summary.size(2)+1" for variant in ("all_options", "paged")},
        growing={"k": 2, "summary": 2},
        invalid=SUMMARY_INVALID | {"start negative": Invalid("all_options", "start", int32(-1, 0))},
        mutates=("summary",),
    ),
    OpCase(
        name="page_scores",
        calls={"plain": page_bounds, "all_options": page_shares, "clusters": clusters},
        illegal=REDUCE_ILLEGAL
        | {
            "method": ("mean", ""),
            "softmax_scale": ILLEGAL_OPTIONS["softmax_scale"],
            "page_size": (0, -8, 2**20 + 1, INT64_MAX, None),
        },
        extreme={"softmax_scale": EXTREME_OPTIONS["softmax_scale"], "page_size": (1, 2**20)},
        legal_changes=frozenset(
            f"{variant}: {name}.size(2){change}"
            for variant, name in (("all_options", "q"), ("clusters", "q"), ("clusters", "summary"))
            for change in ("+1", "=0")
        ),
        growing={"q": 2, "summary": 2},
        invalid={
            "seqused_k past the pages": Invalid("all_options", "seqused_k", int32(49, 26)),
            "seqused_k negative": Invalid("all_options", "seqused_k", int32(48, -1)),
            "counts negative": Invalid("all_options", "counts", torch.full((2, 3, 6), -1).int()),
        },
        differentiable=("q", "summary"),
    ),
    OpCase(
        name="token_scores",
        calls={
            "plain": scored_keys,
            "all_options": scored_all_options,
            "candidates": scored_candidates,
            "paged": scored_pages,
        },
        illegal=REDUCE_ILLEGAL | {name: ILLEGAL_OPTIONS[name] for name in ("softmax_scale", "softcap")},
        extreme={name: EXTREME_OPTIONS[name] for name in ("softmax_scale", "softcap")},
        legal_changes=PAGED_CHANGES
        | {"paged: k.size(2)+1"}
        | {
            f"{variant}: {dim}{change}"
            for variant, dims in (
                ("all_options", ("q.size(2)", "k.size(2)")),
                ("candidates", ("k.size(2)", "candidates.size(3)")),
                ("paged", ("q.size(2)", "page_table.size(1)", "candidates.size(3)")),
            )
            for dim in dims
            for change in ("+1", "=0")
        },
        growing={"q": 2, "k": 2},
        invalid={
            "seqused_k past the keys": Invalid("all_options", "seqused_k", int32(301, 3)),
            "seqused_k negative": Invalid("all_options", "seqused_k", int32(300, -1)),
            "candidates past the keys": Invalid("candidates", "candidates", torch.full((2, 4, 3, 40), 75).int()),
            "candidates below -1": Invalid("candidates", "candidates", torch.full((2, 4, 3, 40), -2).int()),
            "page_table past the pages": Invalid("paged", "page_table", torch.full((2, 7), 15).int()),
            "page_table negative": Invalid("paged", "page_table", torch.full((2, 7), -1).int()),
        },
        differentiable=("q", "k"),
    ),
)
