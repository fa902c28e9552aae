"""Valid calls of the top-k KV family, and what is illegal about their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from op_case import (
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
from prefill_cases import INVALID_SEQUENCES


def score_rows(*shape: int, **options: Any) -> Callable[[torch.dtype], Call]:
    """Rows of scores with ties and -inf."""

    def build(dtype: torch.dtype) -> Call:
        scores = (4 * randn(*shape, seed=70)).round() / 4
        scores[..., 3::17] = -torch.inf
        return {"scores": scores.to(dtype)} | options

    return build


def random_indices(*shape: int, num_blocks: int, seed: int) -> Tensor:
    """int32 `shape`: in each row different blocks in any order, some of them -1."""
    order = torch.rand(*shape[:-1], num_blocks, generator=generator(seed)).argsort(dim=-1)
    indices = torch.nn.functional.pad(order, (0, max(0, shape[-1] - num_blocks)), value=-1)[..., : shape[-1]]
    return indices.masked_fill(torch.rand(shape, generator=generator(seed + 1)) < 0.1, -1).int()


def gathered(dtype: torch.dtype, *, index_heads: int = 2, num_entries: int = 20, block_size_k: int = 1,
             seed: int = 0, **sizes: int) -> Call:  # fmt: skip
    call = qkv(dtype, **({"seqlen_q": 3, "seed": seed} | sizes))
    batch, _, seqlen_q, _ = call["q"].shape
    blocks = -(-call["k"].shape[2] // block_size_k)
    indices = random_indices(batch, index_heads, seqlen_q, num_entries, num_blocks=blocks, seed=seed + 7)
    return call | {"indices": indices} | ({"block_size_k": block_size_k} if block_size_k > 1 else {})


def gathered_paged(dtype: torch.dtype) -> Call:
    """7 of 15 pages of 16 keys, in any order, no two batch entries the same; a bias, of some entries -inf."""
    call = gathered(dtype, num_q_heads=6, num_kv_heads=3, index_heads=6, num_entries=40, head_dim_v=24, seed=80)
    pages = qkv(dtype, batch=15, num_kv_heads=3, seqlen_k=16, head_dim_v=24, seed=81)
    bias = randn(2, 6, 3, 40, seed=82)
    bias[..., ::9] = -torch.inf
    return call | {
        "k": pages["k"],
        "v": pages["v"],
        "bias": bias,
        "seqused_k": int32(75, 110),
        "page_table": torch.randperm(15, generator=generator(83))[:14].view(2, 7).int(),
        "num_last": 4,
    }


def gathered_all_options(dtype: torch.dtype) -> Call:
    """A static cache of which blocks of 4 keys are read, and every token its own number of them."""
    sizes = {"num_q_heads": 6, "num_kv_heads": 3, "head_dim_v": 24}
    call = gathered(dtype, index_heads=3, num_entries=13, block_size_k=4, seed=70, **sizes)
    call["indices"][1][call["indices"][1] > 10] = -1  # blocks of 41 keys
    return call | {
        "counts": torch.randint(0, 14, (2, 3, 3), generator=generator(71), dtype=torch.int32),
        "num_first": 3,
        "num_last": 5,
        "softmax_scale": 0.3,
        "softcap": 3.0,
        "seqused_k": int32(75, 41),
    }


def rope_table(num_positions: int, rotary_dim: int) -> Tensor:
    """float32 [num_positions, 2, rotary_dim / 2]: cosines and sines."""
    frequencies = 1e4 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def gathered_roped(dtype: torch.dtype) -> Call:
    """Blocks of 4 keys at positions of their own, the last ones and the tokens at their own end of the table."""
    call = gathered(dtype, index_heads=2, num_entries=13, block_size_k=4, head_dim=40, seed=90)
    return call | {
        "num_first": 3,
        "num_last": 5,
        "k_positions": torch.randint(0, 60, (2, 2, 3, 13), generator=generator(91), dtype=torch.int32),
        "q_positions": int32((61, 62, 63), (8, 30, 31)),
        "rope_cos_sin": rope_table(64, 32),
    }


def gathered_tree(dtype: torch.dtype) -> Call:
    """Five speculative tokens of a tree that share their entries; every result."""
    call = gathered(
        dtype, num_q_heads=6, num_kv_heads=3, index_heads=3, seqlen_q=5, num_entries=9, block_size_k=8, seed=95
    )
    parents = [torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 2, 3])]
    mask = torch.eye(5, dtype=torch.bool).repeat(2, 1, 1)
    for b, parent in enumerate(parents):
        for i in range(1, 5):
            mask[b, i] |= mask[b, parent[i]]
    depth = mask.sum(dim=-1).int()
    return call | {
        "indices": call["indices"][:, :, :1].contiguous(),
        "bias": randn(2, 3, 1, 9, seed=97),
        "counts": torch.full((2, 3, 1), 8, dtype=torch.int32),
        "tree_mask": mask,
        "num_first": 2,
        "num_last": 9,
        "q_positions": 69 + depth,
        "rope_cos_sin": rope_table(75, 16),
        "return_key_mass": True,
        "return_block_states": True,
        "workspace": torch.zeros(60, dtype=torch.int32),
    }


def placed(argument: str, value: int) -> Invalid:
    """The roped call with the first element of `argument` replaced; its first entry lists a block."""
    call = gathered_roped(torch.float32)
    tensor = call[argument].clone()
    tensor.view(-1)[int(call["indices"].flatten().argmax()) if argument == "k_positions" else 0] = value
    return Invalid("roped", argument, tensor)


def selected(argument: str, index: tuple[int, ...], value: int) -> Invalid:
    """The all_options call of gather_attention with one element of `argument` replaced."""
    call = gathered_all_options(torch.float32)
    tensor = call[argument].clone()
    tensor[index] = value
    return Invalid("all_options", argument, tensor)


SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROW_CHANGES = frozenset(
    f"{variant}: scores{change}"
    for variant, dim in (("all_options", 3), ("one_row", 0))
    for change in (f".size({dim})+1", f".size({dim})=0", " of dtype torch.bfloat16", " with one more dim")
) - {"all_options: scores with one more dim"} | {"one_row: scores on another device"}

INVALID_LENGTHS = {
    "lengths past the scores": Invalid("all_options", "lengths", int32(*[51] * 24).view(2, 3, 4)),
    "lengths negative": Invalid("all_options", "lengths", int32(*[-1] * 24).view(2, 3, 4)),
}

CASES = (
    OpCase(
        name="gather_attention",
        calls={
            "plain": gathered,
            "all_options": gathered_all_options,
            "paged": gathered_paged,
            "roped": gathered_roped,
            "tree": gathered_tree,
        },
        illegal={name: ILLEGAL_OPTIONS[name] for name in ("softmax_scale", "softcap")}
        | {
            "block_size_k": (0, -16, 2**31, INT64_MAX),
            "num_first": (-1, -INT64_MAX),
            "num_last": (-1, -INT64_MAX),
            "k_position_step": (-1, 2, INT64_MAX),
        },
        extreme={name: EXTREME_OPTIONS[name] for name in ("softmax_scale", "softcap")}
        | {
            "block_size_k": (1, 7, 2**20),
            "num_first": (INT32_MAX, INT64_MAX),
            "num_last": (INT32_MAX, INT64_MAX),
        },
        legal_changes=frozenset(
            {"paged: v.size(3)+1", "paged: page_table.size(1)+1", "paged: page_table.size(1)=0"}
            | {f"all_options: {change}" for change in ("v.size(3)+1", "indices.size(3)+1", "indices.size(3)=0")}
            | {"roped: v.size(3)+1", "roped: rope_cos_sin.size(0)+1", "roped: rope_cos_sin.size(0)=0"}
            | {"roped: rope_cos_sin.size(2)+1"}
            | {"tree: v.size(3)+1", "tree: rope_cos_sin.size(0)+1", "tree: rope_cos_sin.size(0)=0"}
            | {"tree: workspace.size(0)+1"}
        ),
        growing={"k": 2, "v": 2, "indices": 3},
        invalid={why: INVALID_SEQUENCES[why] for why in ("seqused_k past the keys", "seqused_k negative")}
        | {
            "indices past the keys": selected("indices", (0, 0, 0, 0), 19),
            "indices past the keys of their entry": selected("indices", (1, 0, 0, 0), 11),
            "workspace not zero": Invalid("tree", "workspace", torch.ones(60, dtype=torch.int32)),
            "indices below -1": selected("indices", (0, 0, 0, 0), -2),
            "indices twice": Invalid("all_options", "indices", torch.full((2, 3, 3, 13), 7, dtype=torch.int32)),
            "page_table past the pages": Invalid("paged", "page_table", torch.full((2, 7), 15).int()),
            "page_table negative": Invalid("paged", "page_table", torch.full((2, 7), -1).int()),
            "counts negative": selected("counts", (0, 0, 0), -1),
            "counts past the entries": selected("counts", (0, 0, 0), 14),
            "k_positions negative": placed("k_positions", -1),
            "k_positions past the table": placed("k_positions", 63),
            "q_positions negative": placed("q_positions", -1),
            "q_positions past the table": placed("q_positions", 64),
            "rope_cos_sin too short": Invalid("plain", "rope_cos_sin", rope_table(74, 16)),
        },
        differentiable=("q", "k", "v"),
        any_strides=frozenset({"counts", "q_positions"}),
        zeros=frozenset({"workspace"}),
    ),
    OpCase(
        name="topk_select",
        calls={
            "plain": score_rows(2, 3, 5, 40, k=7),
            "all_options": score_rows(
                2,
                3,
                4,
                50,
                k=9,
                lengths=int32(*(2 * (0, 1, 3, 5, 6, 9, 10, 33, 40, 48, 49, 50))).view(2, 3, 4),
                num_first=2,
                num_last=3,
            ),
            "one_row": score_rows(300, k=20, num_last=4),
        },
        illegal={
            "k": (-1, 4, 2**31, INT64_MAX, -INT64_MAX),
            "num_first": (-1, -INT64_MAX),
            "num_last": (-1, -INT64_MAX),
        },
        extreme={"k": (5, 50, 1000), "num_first": (0, 6), "num_last": (0, 7)},
        legal_changes=ROW_CHANGES,
        growing={"scores": 3},
        invalid=INVALID_LENGTHS,
        any_strides=frozenset({"lengths"}),
        dtypes=SCORE_DTYPES,
    ),
    OpCase(
        name="threshold_select",
        calls={
            "plain": score_rows(2, 3, 5, 40, value=0.5, max_k=12),
            "all_options": score_rows(
                2,
                3,
                4,
                50,
                value=0.6,
                method="cumulative",
                max_k=11,
                lengths=int32(*(2 * (0, 1, 3, 5, 6, 9, 10, 33, 40, 48, 49, 50))).view(2, 3, 4),
                num_first=1,
                num_last=2,
            ),
            "one_row": score_rows(300, value=-0.5, max_k=20, num_last=4),
        },
        illegal={
            "value": (float("nan"),),
            "method": ("top_k", ""),
            "max_k": (-1, 2, 2**31, INT64_MAX, -INT64_MAX),
            "num_first": (-1, -INT64_MAX),
            "num_last": (-1, -INT64_MAX),
        },
        extreme={
            "value": (0.0, 1.0, -1e30, 1e30, float("inf"), -float("inf")),
            "max_k": (3, 50, 1000),
            "num_first": (0, 9),
            "num_last": (0, 10),
        },
        legal_changes=ROW_CHANGES,
        growing={"scores": 3},
        invalid=INVALID_LENGTHS,
        any_strides=frozenset({"lengths"}),
        dtypes=SCORE_DTYPES,
    ),
)
