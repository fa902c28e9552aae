"""Valid calls of the ops on rows of caches, moved or clustered, and what is illegal about their arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from op_case import ALL_DTYPES, INT64_MAX, Call, Invalid, OpCase, generator, int32, qkv, randn
from topk_cases import random_indices

PAGED_LENGTHS = (75, 110)


def caches(dtype: torch.dtype, *, names: tuple[str, str] = ("k", "v"), seed: int = 90) -> Call:
    call = qkv(dtype, num_q_heads=3, num_kv_heads=3, head_dim_v=24, seed=seed)
    return {names[0]: call["k"], names[1]: call["v"]}


def paged_caches(dtype: torch.dtype, *, names: tuple[str, str] = ("k", "v")) -> Call:
    """7 of 15 pages of 16 keys, in any order, no two batch entries the same."""
    pages = qkv(dtype, batch=15, num_kv_heads=3, seqlen_k=16, head_dim_v=24, seed=91)
    table = torch.randperm(15, generator=generator(92))[:14].view(2, 7).int()
    return {
        names[0]: pages["k"],
        names[1]: pages["v"],
        "seqused_k": int32(*PAGED_LENGTHS),
        "page_table": table,
    }


def ascending(*shape: int, num_keys: int, seed: int) -> Tensor:
    """int32 `shape`: in each list different keys, ascending, with a tail of -1."""
    listed = random_indices(*shape, num_blocks=num_keys, seed=seed).long()
    listed = listed.where(listed >= 0, num_keys).sort(dim=-1).values
    return listed.where(listed < num_keys, -1).int()


def gathered_rows(dtype: torch.dtype) -> Call:
    return caches(dtype) | {"indices": random_indices(2, 3, 20, num_blocks=75, seed=93)}


def gathered_rows_all_options(dtype: torch.dtype) -> Call:
    lists = torch.cat([random_indices(1, 1, 90, num_blocks=used, seed=94) for used in (75, 41)])
    return caches(dtype) | {"indices": lists, "counts": int32([88], [30]), "seqused_k": int32(75, 41)}


def gathered_rows_paged(dtype: torch.dtype) -> Call:
    lists = random_indices(2, 3, 40, num_blocks=75, seed=95)
    return paged_caches(dtype) | {"indices": lists, "counts": int32([40, 0, 7], [1, 39, 40])}


NAMES = ("k_cache", "v_cache")


def compacted(dtype: torch.dtype) -> Call:
    return caches(dtype, names=NAMES) | {"indices": ascending(2, 3, 20, num_keys=75, seed=96)}


def compacted_all_options(dtype: torch.dtype) -> Call:
    lists = ascending(2, 1, 60, num_keys=75, seed=97)
    return caches(dtype, names=NAMES) | {"indices": lists, "counts": int32([50], [30]), "seqused_k": int32(75, 75)}


def compacted_paged(dtype: torch.dtype) -> Call:
    lists = ascending(2, 3, 40, num_keys=75, seed=98)
    return paged_caches(dtype, names=NAMES) | {"indices": lists, "counts": int32([40, 0, 7], [1, 39, 40])}


def truncated(dtype: torch.dtype) -> Call:
    return caches(dtype, names=NAMES) | {"seqused_k": int32(75, 41), "num_draft_tokens": 9}


def truncated_path(dtype: torch.dtype) -> Call:
    path = int32([0, 2, 3, 11, -1, -1], [1, 5, 6, 7, 8, 10])
    return truncated(dtype) | {"num_draft_tokens": 12, "accepted": path, "counts": int32(5, 4)}


def truncated_chain(dtype: torch.dtype) -> Call:
    """Of the second batch entry the draft is all there is."""
    return paged_caches(dtype, names=NAMES) | {"num_draft_tokens": 75, "counts": int32(3, 75)}


def appended(dtype: torch.dtype, *, num_new: int = 5, seed: int = 103) -> Call:
    new = qkv(dtype, num_kv_heads=3, seqlen_k=num_new, head_dim_v=24, seed=seed)
    return caches(dtype, names=NAMES) | {"k": new["k"], "v": new["v"], "start": 40}


def appended_all_options(dtype: torch.dtype) -> Call:
    """To a static cache, with extremes of pages, of which there are more than the cache has room for."""
    pages = {"summary": randn(2, 3, 7, 2, 16, dtype=dtype, seed=106), "summary_page_size": 16}
    return appended(dtype, num_new=20) | pages | {"start": int32(3, 62), "counts": int32(20, 13)}


def appended_paged(dtype: torch.dtype) -> Call:
    """To a cache in pages of 16 keys, with means of pages of 7."""
    call = appended(dtype, num_new=33) | paged_caches(dtype, names=NAMES)
    call["start"] = call.pop("seqused_k") - 33
    pages = {"summary": randn(2, 3, 16, 16, dtype=dtype, seed=107), "summary_page_size": 7}
    return call | pages | {"summary_method": "mean"}


def clustered(dtype: torch.dtype) -> Call:
    return {"keys": randn(2, 2, 40, 16, dtype=dtype, seed=100), "num_clusters": 5}


def clustered_all_options(dtype: torch.dtype) -> Call:
    """Rows that stand for several keys or for none, and lists that end early, one at once."""
    counts = torch.randint(0, 4, (2, 3, 50), generator=generator(102), dtype=torch.int32)
    return {
        "keys": randn(2, 3, 50, 16, dtype=dtype, seed=101),
        "num_clusters": 37,
        "num_iters": 3,
        "seed": 11,
        "metric": "euclidean",
        "counts": counts,
        "lengths": int32([50, 33, 0], [1, 7, 49]),
    }


def edited(
    make: Callable[[torch.dtype], Call], variant: str, argument: str, index: tuple[int, ...], value: int
) -> Invalid:
    tensor = make(torch.float32)[argument].clone()
    tensor[index] = value
    return Invalid(variant, argument, tensor)


def legal_changes(*names: str, lists: str) -> frozenset[str]:
    """Any number of entries, of pages of a batch entry, and any head_dim."""
    k, v = names
    dims = {f"{name}.size(3){change}" for name in (k, v) for change in ("+1", "=0")}
    return frozenset(
        {f"{variant}: {change}" for variant in ("all_options", "paged", "path", "chain") for change in dims}
        | {f"{variant}: {lists}{change}" for variant in ("all_options", "paged", "path") for change in ("+1", "=0")}
        | {f"{variant}: page_table.size(1)+1" for variant in ("paged", "chain")}
        | {"paged: page_table.size(1)=0"}
    )


def invalid_lists(make: dict[str, Callable[[torch.dtype], Call]]) -> dict[str, Invalid]:
    options, paged = make["all_options"], make["paged"]
    return {
        "indices past the keys": edited(options, "all_options", "indices", (0, 0, 49), 75),
        "indices below -1": edited(options, "all_options", "indices", (0, 0, 0), -2),
        "counts negative": edited(options, "all_options", "counts", (0, 0), -1),
        "counts past the entries": edited(options, "all_options", "counts", (0, 0), 91),
        "seqused_k past the keys": edited(options, "all_options", "seqused_k", (0,), 76),
        "seqused_k negative": edited(options, "all_options", "seqused_k", (0,), -1),
        "page_table past the pages": edited(paged, "paged", "page_table", (0, 0), 15),
        "page_table negative": edited(paged, "paged", "page_table", (0, 0), -1),
    }


GATHERED = {"plain": gathered_rows, "all_options": gathered_rows_all_options, "paged": gathered_rows_paged}
COMPACTED = {"plain": compacted, "all_options": compacted_all_options, "paged": compacted_paged}
CLUSTERED = {"plain": clustered, "all_options": clustered_all_options}
APPENDED = {"plain": appended, "all_options": appended_all_options, "paged": appended_paged}
TRUNCATED = {"plain": truncated, "path": truncated_path, "chain": truncated_chain}

CASES = (
    OpCase(
        name="gather_kv",
        calls=GATHERED,
        legal_changes=legal_changes("k", "v", lists="indices.size(2)"),
        growing={"k": 2, "v": 2, "indices": 2},
        invalid=invalid_lists(GATHERED),
        differentiable=("k", "v"),
        any_strides=frozenset({"counts"}),
        dtypes=ALL_DTYPES,
    ),
    OpCase(
        name="compact_kv",
        calls=COMPACTED,
        legal_changes=legal_changes(*NAMES, lists="indices.size(2)"),
        growing={"k_cache": 2, "v_cache": 2, "indices": 2},
        invalid=invalid_lists(COMPACTED)
        | {"indices twice": Invalid("all_options", "indices", torch.full((2, 1, 60), 7).int())},
        any_strides=frozenset({"counts"}),
        mutates=NAMES,
        dtypes=ALL_DTYPES,
    ),
    OpCase(
        name="truncate_kv",
        calls=TRUNCATED,
        illegal={"num_draft_tokens": (-1, 76, INT64_MAX, -INT64_MAX)},
        extreme={"num_draft_tokens": (0, 42, 75)},
        legal_changes=legal_changes(*NAMES, lists="accepted.size(1)"),
        growing={"k_cache": 2, "v_cache": 2},
        invalid={
            "seqused_k past the keys": edited(truncated_path, "path", "seqused_k", (0,), 76),
            "seqused_k negative": edited(truncated_path, "path", "seqused_k", (0,), -1),
            "accepted past the draft": edited(truncated_path, "path", "accepted", (0, 4), 12),
            "accepted below -1": edited(truncated_path, "path", "accepted", (0, 4), -2),
            "accepted twice": edited(truncated_path, "path", "accepted", (0, 1), 0),
            "counts negative": edited(truncated_path, "path", "counts", (0,), -1),
            "counts past the entries": edited(truncated_path, "path", "counts", (0,), 7),
            "counts past the draft": edited(truncated_chain, "chain", "counts", (0,), 76),
            "page_table negative": edited(truncated_chain, "chain", "page_table", (0, 0), -1),
        },
        any_strides=frozenset({"counts"}),
        mutates=NAMES,
        dtypes=ALL_DTYPES,
    ),
    OpCase(
        name="append_kv",
        calls=APPENDED,
        illegal={
            "start": (-1, 76, INT64_MAX, -INT64_MAX),
            "summary_page_size": (0, -16, 2**20 + 1, INT64_MAX),
            "summary_method": ("representative", "pooled", ""),
        },
        extreme={"start": (0, 75)},
        legal_changes=frozenset(
            {f"{variant}: summary.size(2)+1" for variant in ("all_options", "paged")} | {"paged: page_table.size(1)=0"}
        ),
        growing={"k_cache": 2, "v_cache": 2},
        invalid={
            "start negative": edited(appended_all_options, "all_options", "start", (0,), -1),
            "start past the room": edited(appended_all_options, "all_options", "start", (1,), 63),
            "counts negative": edited(appended_all_options, "all_options", "counts", (0,), -1),
            "counts past the tokens": edited(appended_all_options, "all_options", "counts", (0,), 21),
            "page_table past the pages": edited(appended_paged, "paged", "page_table", (0, 0), 15),
            "page_table negative": edited(appended_paged, "paged", "page_table", (0, 0), -1),
        },
        any_strides=frozenset({"counts"}),
        mutates=(*NAMES, "summary"),
    ),
    OpCase(
        name="kmeans",
        calls=CLUSTERED,
        illegal={
            "num_clusters": (0, -1, 2**24 + 1, INT64_MAX),
            "num_iters": (-1, -INT64_MAX),
            "metric": ("dot", ""),
        },
        extreme={"num_clusters": (1, 200), "num_iters": (0, 100), "seed": (INT64_MAX, -INT64_MAX - 1)},
        legal_changes=frozenset(
            f"all_options: keys{change}"
            for change in (".size(3)+1", " of dtype torch.float64", " of dtype torch.bfloat16")
        ),
        growing={"keys": 2},
        invalid={
            "counts negative": edited(clustered_all_options, "all_options", "counts", (0, 0, 0), -1),
            "lengths past the rows": edited(clustered_all_options, "all_options", "lengths", (0, 0), 51),
            "lengths negative": edited(clustered_all_options, "all_options", "lengths", (0, 0), -1),
        },
        differentiable=("keys",),
        any_strides=frozenset({"lengths"}),
    ),
)
