"""Valid calls of the prefill family, and what is illegal about their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import longctx.reference
from longctx.testing import block_list
from op_case import (
    ALL_DTYPES,
    EXTREME_OPTIONS,
    ILLEGAL_OPTIONS,
    INT32_MAX,
    INT64_MAX,
    Call,
    Invalid,
    OpCase,
    generator,
    int32,
    qkv,
    randn,
)


def random_ranges(batch: int, num_ranges: int, seqlen_q: int, seqlen_k: int, *, seed: int) -> Tensor:
    """`key_ranges` of which about half are reversed or empty."""
    shape = (batch, num_ranges, seqlen_q, 2)
    return torch.randint(0, seqlen_k + 1, shape, generator=generator(seed), dtype=torch.int32)


def random_blocks(
    call: Call,
    *,
    block_size_q: int,
    block_size_k: int,
    pattern_heads: int = 1,
    pattern_batch: int = 1,
    density: float = 0.4,
    seed: int = 0,
) -> Call:
    """`call` with a random block list over its axes: some rows empty, a tail of -1."""
    rows = -(-call["q"].shape[2] // block_size_q)
    columns = -(-call["k"].shape[2] // block_size_k)
    own = torch.ones(rows, columns, dtype=torch.bool)
    if "cu_seqlens_q" in call:
        # Each sequence owns the next rows; the bound on their number needs no lengths on the host.
        own = torch.zeros(rows + len(call["cu_seqlens_q"]) - 1, columns, dtype=torch.bool)
        row = 0
        for length_q, length_k in zip(
            call["cu_seqlens_q"].diff().tolist(), call["cu_seqlens_k"].diff().tolist(), strict=True
        ):
            own[row : row + -(-length_q // block_size_q), : -(-length_k // block_size_k)] = True
            row += -(-length_q // block_size_q)
    mask = own & (torch.rand(pattern_batch, pattern_heads, *own.shape, generator=generator(seed)) < density)
    mask[:, :, 1::5] = False
    block_indptr, block_indices = block_list(mask, spare=3)
    return call | {
        "block_indptr": block_indptr,
        "block_indices": block_indices,
        "block_size_q": block_size_q,
        "block_size_k": block_size_k,
    }


def plain(dtype: torch.dtype) -> Call:
    return qkv(dtype, head_dim_v=24)


def all_options(dtype: torch.dtype) -> Call:
    """A static cache under every part of the predicate at once."""
    return qkv(dtype, num_q_heads=6, num_kv_heads=3, head_dim_v=24, seed=3) | {
        "causal": True,
        "softmax_scale": 0.3,
        "window_size_left": 20,
        "window_size_right": 4,
        "num_sink_tokens": 2,
        "softcap": 3.0,
        "sinks": randn(6, seed=4),
        "key_ranges": random_ranges(2, 2, 37, 75, seed=5),
        "seqused_k": int32(75, 41),
    }


def packed(dtype: torch.dtype) -> Call:
    """Packed sequences, some without queries, without keys, or without both."""
    return qkv(dtype, batch=1, seqlen_q=50, seqlen_k=70, head_dim_v=24, seed=6) | {
        "cu_seqlens_q": int32(0, 0, 17, 22, 22, 45, 50),
        "cu_seqlens_k": int32(0, 4, 34, 37, 37, 70, 70),
    }


def with_blocks(call: Callable[[torch.dtype], Call], **blocks: Any) -> Callable[[torch.dtype], Call]:
    return lambda dtype: random_blocks(call(dtype), **blocks)


def states(dtype: torch.dtype) -> Call:
    lse = randn(3, 2, 4, 19, dtype=torch.promote_types(dtype, torch.float32), seed=8)
    lse[0, 0, :, ::4] = -torch.inf
    lse[:, 1, :, 5] = -torch.inf
    return {"out": randn(3, 2, 4, 19, 24, dtype=dtype, seed=7), "lse": lse}


def overridden_states(dtype: torch.dtype) -> Call:
    call = states(dtype)
    return call | {"lse_override": call["lse"].roll(1, dims=0)}


def mass(call: Callable[[torch.dtype], Call], **options: Any) -> Callable[[torch.dtype], Call]:
    """The call of `attention_mass` on what attention returns for `call`."""

    def build(dtype: torch.dtype) -> Call:
        arguments = call(dtype)
        _, lse = longctx.reference.attention(**arguments)
        del arguments["v"]
        return arguments | {"lse": lse} | options

    return build


def scored(call: Callable[[torch.dtype], Call], **options: Any) -> Callable[[torch.dtype], Call]:
    """The call of `block_scores` on the axes of `call`."""
    names = ("q", "k", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    return lambda dtype: {name: value for name, value in call(dtype).items() if name in names} | options


def block_map(*shape: int, **options: Any) -> Callable[[torch.dtype], Call]:
    return lambda dtype: {"scores": torch.softmax(randn(*shape, dtype=dtype, seed=9), dim=-1)} | options


ILLEGAL_BLOCK_SIZES = {
    "block_size_q": (0, -16, 1, 8, 24, 256, 2**31, INT64_MAX),
    "block_size_k": (0, -16, 2, 24, 256, 2**31, INT64_MAX),
}

INVALID_SEQUENCES = {
    "seqused_k past the keys": Invalid("all_options", "seqused_k", int32(75, 76)),
    "seqused_k negative": Invalid("all_options", "seqused_k", int32(-1, 75)),
    "cu_seqlens_q falls": Invalid("packed", "cu_seqlens_q", int32(0, 17, 0, 22, 22, 45, 50)),
    "cu_seqlens_q past the rows": Invalid("packed", "cu_seqlens_q", int32(0, 0, 17, 22, 22, 45, 51)),
    "cu_seqlens_q ends early": Invalid("packed", "cu_seqlens_q", int32(0, 0, 17, 22, 22, 45, 49)),
    "cu_seqlens_k negative": Invalid("packed", "cu_seqlens_k", int32(-1, 4, 34, 37, 37, 70, 70)),
    "cu_seqlens_k falls": Invalid("packed", "cu_seqlens_k", int32(0, 4, 34, 30, 37, 70, 70)),
    "key_ranges negative": Invalid("all_options", "key_ranges", torch.full((2, 2, 37, 2), -1).int() + int32(0, 3)),
    "key_ranges past the keys": Invalid("all_options", "key_ranges", torch.full((2, 1, 37, 2), 75).int() + int32(0, 1)),
}

BLOCKS_ALL_OPTIONS = with_blocks(all_options, block_size_q=16, block_size_k=8, pattern_heads=3, pattern_batch=2)


def edited(argument: str, index: tuple[int, ...], value: int) -> Invalid:
    """The block list of the all_options call with one element of `argument` replaced."""
    tensor = BLOCKS_ALL_OPTIONS(torch.float32)[argument].clone()
    tensor[index] = value
    return Invalid("all_options", argument, tensor)


INVALID_BLOCKS = {
    "block_indices not ascending": edited("block_indices", (0,), 9),
    "block_indices negative": edited("block_indices", (0,), -1),
    "block_indices past the keys": edited("block_indices", (0,), 10),
    "block_indices twice": edited("block_indices", (1,), int(BLOCKS_ALL_OPTIONS(torch.float32)["block_indices"][0])),
    "block_indptr falls": edited("block_indptr", (0, 0, 1), 10_000),
    "block_indptr negative": edited("block_indptr", (0, 0, 0), -1),
    "block_indptr past the capacity": edited("block_indptr", (1, 2, 3), 10_000),
}

CASES = (
    OpCase(
        name="merge_states",
        calls={"plain": states, "override": overridden_states},
        legal_changes=frozenset(
            f"{variant}: {change}"
            for variant in ("plain", "override")
            for change in ("out.size(4)+1", "out.size(4)=0", "out of dtype torch.bfloat16")
        ),
        growing={"out": 3, "lse": 3},
        differentiable=("out", "lse"),
        any_strides=frozenset({"out", "lse", "lse_override"}),
        dtypes=ALL_DTYPES,
    ),
    OpCase(
        name="attention",
        calls={"plain": plain, "all_options": all_options, "packed": packed},
        illegal=ILLEGAL_OPTIONS,
        extreme=EXTREME_OPTIONS,
        legal_changes=frozenset(
            {"all_options: v.size(3)+1", "packed: v.size(3)+1", "packed: q.size(2)+1", "packed: q.size(2)=0"}
        ),
        growing={"q": 2, "k": 2, "v": 2},
        invalid=INVALID_SEQUENCES,
        differentiable=("q", "k", "v"),
    ),
    OpCase(
        name="block_sparse_attention",
        calls={
            "plain": with_blocks(plain, block_size_q=16, block_size_k=32, density=0.8),
            "all_options": BLOCKS_ALL_OPTIONS,
            "packed": with_blocks(packed, block_size_q=16, block_size_k=8, pattern_heads=4),
        },
        illegal=ILLEGAL_OPTIONS | ILLEGAL_BLOCK_SIZES,
        extreme=EXTREME_OPTIONS,
        legal_changes=frozenset(
            f"{variant}: {change}"
            for variant in ("all_options", "packed")
            for change in ("v.size(3)+1", "block_indices.size(0)+1", "block_indices.size(0)=0")
        )
        | {"packed: q.size(2)+1"},
        growing={"k": 2, "v": 2},
        invalid=INVALID_SEQUENCES | INVALID_BLOCKS,
        differentiable=("q", "k", "v"),
    ),
    OpCase(
        name="attention_mass",
        calls={
            "plain": mass(plain, reduce="both"),
            "all_options": mass(all_options, segment_offsets=int32(0, 9, 9, 50, 75)),
            "packed": mass(packed, reduce="diagonal"),
        },
        illegal=ILLEGAL_OPTIONS | {"reduce": ("row", "")},
        extreme=EXTREME_OPTIONS,
        legal_changes=frozenset(
            {"all_options: segment_offsets.size(0)+1"}
            | {f"{variant}: k.size(2){change}" for variant in ("all_options", "packed") for change in ("+1", "=0")}
        ),
        growing={"q": 2, "k": 2, "lse": 2},
        invalid=INVALID_SEQUENCES
        | {
            "segment_offsets fall": Invalid("all_options", "segment_offsets", int32(0, 9, 8, 75)),
            "segment_offsets past the keys": Invalid("all_options", "segment_offsets", int32(0, 9, 76)),
            "segment_offsets negative": Invalid("all_options", "segment_offsets", int32(-1, 9, 75)),
        },
        differentiable=("q", "k", "lse"),
        any_strides=frozenset({"lse"}),
    ),
    OpCase(
        name="block_scores",
        calls={
            "plain": scored(plain, block_size_q=16, block_size_k=8),
            "all_options": scored(all_options, block_size_q=32, block_size_k=16, method="max_mean", softmax=False),
            "packed": scored(packed, block_size_q=16, block_size_k=8, method="antidiagonal", stride=8),
        },
        illegal=ILLEGAL_BLOCK_SIZES
        | {
            "method": ("sum", ""),
            "softmax_scale": (float("nan"), float("inf")),
            "q_offset": (INT64_MAX, -INT64_MAX),
        },
        extreme={"q_offset": (2**39, -(2**39)), "softmax_scale": (0.0, -1.0)},
        legal_changes=frozenset(
            f"{variant}: {change}"
            for variant in ("all_options", "packed")
            for change in ("q.size(2)+1", "q.size(2)=0", "k.size(2)+1", "k.size(2)=0")
        ),
        growing={"q": 2, "k": 2},
        invalid={why: case for why, case in INVALID_SEQUENCES.items() if case.argument != "key_ranges"},
        differentiable=("q", "k"),
    ),
    OpCase(
        name="select_blocks",
        calls={
            "plain": block_map(2, 3, 7, 9, method="top_k", value=3),
            "all_options": block_map(
                2,
                3,
                5,
                19,
                method="cumulative",
                value=torch.tensor([0.3, 0.7, 1.0]),
                scope="head",
                num_first=1,
                num_local=2,
                block_size_q=16,
                block_size_k=8,
                q_offset=-80,
                max_blocks_per_row=6,
                seqused_k=int32(150, 77),
            ),
            "packed": block_map(
                1,
                4,
                10,
                9,
                method="relative",
                value=0.5,
                block_size_q=16,
                block_size_k=8,
                cu_seqlens_q=packed(torch.float32)["cu_seqlens_q"],
                cu_seqlens_k=packed(torch.float32)["cu_seqlens_k"],
            ),
        },
        illegal=ILLEGAL_BLOCK_SIZES
        | {
            "method": ("best", ""),
            "scope": ("map", ""),
            "value": (float("nan"),),
            "num_first": (-1, -INT64_MAX),
            "num_local": (-1, -INT64_MAX),
            "max_blocks_per_row": (0, 2, -INT64_MAX),
            "q_offset": (INT64_MAX, -INT64_MAX),
        },
        extreme={
            "q_offset": (2**39, -(2**39)),
            "value": (0.0, 1e30, -1e30, float("inf"), -float("inf")),
            "max_blocks_per_row": (INT32_MAX, INT64_MAX, None),
        },
        legal_changes=frozenset(
            f"{variant}: scores.size({dim}){change}"
            for variant, dims in (("all_options", (2, 3)), ("packed", (1, 2, 3)))
            for dim in dims
            for change in ("+1", "=0")
        )
        | {
            f"all_options: value of dtype {dtype}" for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool)
        },
        growing={"scores": 2},
        invalid={
            "seqused_k past the keys": Invalid("all_options", "seqused_k", int32(150, 153)),
            "seqused_k negative": Invalid("all_options", "seqused_k", int32(-1, 77)),
            "cu_seqlens_q falls": Invalid("packed", "cu_seqlens_q", int32(0, 17, 0, 22, 22, 45, 50)),
            "cu_seqlens_k negative": Invalid("packed", "cu_seqlens_k", int32(-1, 4, 34, 37, 37, 70, 70)),
        },
        any_strides=frozenset({"value"}),
        dtypes=(torch.float32,),
    ),
)
