"""`gather_attention` with a workspace: the same bits, one launch, and zeros afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_same_bits, check_attention
from op_case import DTYPES, Call, int32
from topk_cases import gathered, rope_table

on_fibers = pytest.mark.runs_on("simt", reason="counts launches: --simt")

# Sets that CUDA splits, for rows of one block and of several, aligned and not.
SPLIT: dict[str, Callable[[torch.dtype], Call]] = {
    "tokens": lambda dtype: gathered(dtype, seqlen_k=700, num_entries=600, head_dim=64),
    "pages of 16": lambda dtype: gathered(dtype, seqlen_k=3000, num_entries=100, block_size_k=16, seqlen_q=1),
    "17 heads, odd dims": lambda dtype: gathered(
        dtype, batch=1, num_q_heads=17, num_kv_heads=1, index_heads=1, head_dim=7, head_dim_v=5, seqlen_q=2,
        seqlen_k=500, num_entries=400,
    ),
    "ragged": lambda dtype: gathered(dtype, seqlen_q=1, seqlen_k=900, num_entries=700, num_q_heads=8)
    | {"counts": int32((700, 3), (0, 300)).view(2, 2, 1), "num_last": 5},
    "an entry each": lambda dtype: gathered(dtype, num_entries=9, block_size_k=8) | {"return_block_states": True},
}  # fmt: skip


def zeros(call: Call) -> Tensor:
    return torch.zeros(call["q"].shape[:3].numel(), dtype=torch.int32)


def num_launches(call: Call, **options: Any) -> int:
    before: int = torch.ops.longctx_simt.num_launches()
    longctx.gather_attention(**call | options)
    after: int = torch.ops.longctx_simt.num_launches()
    return after - before


@pytest.mark.sanitize(one_in=4)
@pytest.mark.parametrize("make", SPLIT.values(), ids=SPLIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_and_zeros_again(dtype: torch.dtype, make: Callable[[torch.dtype], Call]) -> None:
    call = make(dtype)
    workspace = zeros(call)
    expected = longctx.gather_attention(**call)
    for _ in range(2):
        assert_same_bits(longctx.gather_attention(**call, workspace=workspace), expected)
        assert not workspace.any()
    assert_same_bits(longctx.gather_attention(**call, workspace=workspace, validate=True), expected)


def test_one_workspace_for_calls_of_any_shape() -> None:
    workspace = torch.zeros(1000, dtype=torch.int32)
    for seed, seqlen_q in enumerate((5, 1, 3)):
        call = gathered(torch.float32, seqlen_q=seqlen_q, seqlen_k=400, num_entries=300, seed=seed)
        check_attention("gather_attention", call, workspace=workspace)


def test_too_small_a_workspace_raises() -> None:
    call = gathered(torch.float32, seqlen_q=3)
    rule = (
        "longctx::gather_attention: `workspace` must have at least batch * num_q_heads * seqlen_q = 24 elements; got 23"
    )
    with pytest.raises(ValueError, match=re.escape(rule)):
        longctx.gather_attention(**call, workspace=torch.zeros(23, dtype=torch.int32))


def test_values_are_checked_on_request() -> None:
    call = gathered(torch.float32, seqlen_q=3)
    with pytest.raises(ValueError, match="`workspace` must be zeros; got 1 other values"):
        longctx.gather_attention(**call, workspace=(torch.arange(24) == 5).int(), validate=True)


@on_fibers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch(dtype: torch.dtype) -> None:
    """A step of Quest: 2048 keys in pages of 16, 4 query heads that share them."""
    call = gathered(dtype, num_q_heads=4, num_kv_heads=1, index_heads=1, batch=1, seqlen_q=1, seqlen_k=4096,
                    num_entries=128, block_size_k=16, head_dim=64)  # fmt: skip
    assert num_launches(call) == 2
    assert num_launches(call, workspace=zeros(call)) == 1
    assert num_launches(call, workspace=zeros(call), return_key_mass=True) == 2


@on_fibers
def test_many_states_are_merged_by_many_blocks() -> None:
    """16 rows of 32 segments each."""
    call = gathered(torch.bfloat16, num_q_heads=16, num_kv_heads=1, index_heads=1, batch=1, seqlen_q=1, seqlen_k=4096,
                    num_entries=256, block_size_k=16, head_dim=64)  # fmt: skip
    assert num_launches(call, workspace=zeros(call)) == 2


@on_fibers
def test_short_sets_are_one_launch_anyway() -> None:
    assert num_launches(gathered(torch.float32)) == 1


@on_fibers
@pytest.mark.parametrize("k", [128, 2048])
def test_selecting_among_the_pages_of_a_step_is_one_launch(k: int) -> None:
    """131072 keys in pages of 16, a row a kv head."""
    scores = torch.randn(1, 8, 1, 8192, generator=torch.Generator().manual_seed(0))
    before = torch.ops.longctx_simt.num_launches()
    longctx.topk_select(scores, k, num_last=1)
    assert torch.ops.longctx_simt.num_launches() - before == 1


@pytest.mark.runs_on("cuda", "simt", reason="about the CUDA kernels")
@pytest.mark.parametrize("options", [{}, {"num_first": 3}, {"return_key_mass": True, "num_last": 6}], ids=str)
def test_tokens_share_a_pass_at_positions(options: Call) -> None:
    """What their rotation makes of it is the token's own, where the table has its position."""
    call = gathered(torch.float32, seqlen_q=5, num_q_heads=10, seqlen_k=200, num_entries=12, block_size_k=2)
    call["indices"] = call["indices"][:, :, :1].contiguous()
    call |= {"rope_cos_sin": rope_table(199, 16)} | options
    if "num_last" not in options:
        call["q_positions"] = int32((7, 3, -1, 199, 198), (0, 1, 2, 3, 4))
    out, lse, *mass = longctx.gather_attention(**call)
    twin = longctx.reference.gather_attention(**call)
    for actual, expected in zip((out, lse, *mass), twin, strict=True):
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=0)
