"""`block_sparse_attention` against its float64 twin."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_equal_to_rounding, check_attention
from longctx.testing import block_list
from op_case import DTYPES, Call, int32, qkv
from prefill_cases import random_blocks
from test_attention import random_call

OP = "block_sparse_attention"
BLOCK_SIZES_Q = (16, 32, 64, 128)
BLOCK_SIZES_K = (1, 8, 16, 32, 64, 128)
SIZES = [(block_q, block_k) for block_q in BLOCK_SIZES_Q for block_k in BLOCK_SIZES_K]


def listed(call: Call, mask: Tensor, block_size_q: int, block_size_k: int) -> Call:
    indptr, indices = block_list(mask)
    return call | {
        "block_indptr": indptr,
        "block_indices": indices,
        "block_size_q": block_size_q,
        "block_size_k": block_size_k,
    }


def full_mask(call: Call, block_size_q: int, block_size_k: int) -> Tensor:
    rows = -(-call["q"].shape[2] // block_size_q)
    return torch.ones(1, 1, rows, -(-call["k"].shape[2] // block_size_k), dtype=torch.bool)


@pytest.mark.sanitize(one_in=3)
@pytest.mark.parametrize(("block_size_q", "block_size_k"), SIZES)
def test_block_sizes(isa: str, block_size_q: int, block_size_k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = qkv(dtype, seqlen_q=150, seqlen_k=300)
        check_attention(OP, random_blocks(call, block_size_q=block_size_q, block_size_k=block_size_k, pattern_heads=2))


@pytest.mark.parametrize("head_dim", [1, 7, 64, 80, 96, 128, 192, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    call = qkv(dtype, batch=1, num_q_heads=2, num_kv_heads=1, seqlen_k=140, head_dim=head_dim)
    check_attention(OP, random_blocks(call, block_size_q=16, block_size_k=16))


@pytest.mark.parametrize("pattern_batch", [1, 2])
@pytest.mark.parametrize("pattern_heads", [1, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pattern_of_heads_and_batch(dtype: torch.dtype, pattern_heads: int, pattern_batch: int) -> None:
    call = qkv(dtype, num_q_heads=6, num_kv_heads=3, seqlen_q=70, seqlen_k=150)
    check_attention(
        OP,
        random_blocks(call, block_size_q=32, block_size_k=8, pattern_heads=pattern_heads, pattern_batch=pattern_batch),
    )


@pytest.mark.parametrize(("block_size_q", "block_size_k"), SIZES)
@pytest.mark.parametrize("causal", [True, False])
def test_every_block_equals_dense(block_size_q: int, block_size_k: int, causal: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = qkv(dtype, seqlen_q=150, seqlen_k=300)
        sparse = longctx.block_sparse_attention(
            **listed(call, full_mask(call, block_size_q, block_size_k), block_size_q, block_size_k),
            causal=causal,
        )
        assert_equal_to_rounding(sparse, longctx.attention(**call, causal=causal))


@pytest.mark.sanitize
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 9), (9, 0), (1, 1), (1, 700), (17, 5), (129, 1030)])
def test_lengths(isa: str, seqlen_q: int, seqlen_k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = qkv(dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=9)
        for causal in (True, False):
            check_attention(OP, random_blocks(call, block_size_q=16, block_size_k=8, pattern_heads=4), causal=causal)
            check_attention(OP, random_blocks(call, block_size_q=64, block_size_k=1, density=0.9), causal=causal)


@pytest.mark.parametrize(("block_size_q", "block_size_k"), [(16, 1), (16, 8), (64, 32), (128, 128)])
def test_disjoint_lists_merge_to_the_joint_one(block_size_q: int, block_size_k: int) -> None:
    call = qkv(torch.float32, seqlen_q=150, seqlen_k=400)
    shape = full_mask(call, block_size_q, block_size_k).shape
    generator = torch.Generator().manual_seed(0)
    part = torch.randint(0, 4, (1, 4, *shape[2:]), generator=generator)  # 3: listed nowhere
    states = [longctx.block_sparse_attention(**listed(call, part == i, block_size_q, block_size_k)) for i in range(3)]
    merged = longctx.merge_states(*(torch.stack(parts) for parts in zip(*states, strict=True)))
    joint = longctx.block_sparse_attention(**listed(call, part < 3, block_size_q, block_size_k))
    assert_equal_to_rounding(merged, joint)


@pytest.mark.sanitize
def test_empty_list(isa: str) -> None:
    call = qkv(torch.bfloat16, seqlen_q=40)
    call["k"].fill_(torch.nan)
    call["v"].fill_(torch.nan)
    out, lse = check_attention(OP, listed(call, full_mask(call, 16, 16) & False, 16, 16))
    assert not out.any()
    assert torch.isneginf(lse).all()


@pytest.mark.sanitize(one_in=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size_k", BLOCK_SIZES_K)
def test_nan_in_unlisted_blocks_does_not_leak(isa: str, dtype: torch.dtype, block_size_k: int) -> None:
    call = qkv(dtype, seqlen_q=40, seqlen_k=530)
    mask = full_mask(call, 32, block_size_k)
    mask[..., 1::2] = False
    unlisted = (torch.arange(530) // block_size_k) % 2 == 1
    call["k"][:, :, unlisted] = torch.nan
    call["v"][:, :, unlisted] = torch.nan
    check_attention(OP, listed(call, mask, 32, block_size_k))


@pytest.mark.sanitize
def test_entries_that_are_no_block_or_repeat_are_skipped(isa: str) -> None:
    call = qkv(torch.float32, batch=1, seqlen_q=20, seqlen_k=100) | {"block_size_q": 32, "block_size_k": 32}
    clean = longctx.block_sparse_attention(
        **call, block_indptr=torch.tensor([[[0, 2]]]), block_indices=int32(0, 2), causal=False
    )
    for indices in ((0, 0, 2), (-1, 0, 2), (0, 2, 4), (0, 2, 2**31 - 1), (-(2**31), 0, 2, 2)):
        bad = longctx.block_sparse_attention(
            **call,
            block_indptr=torch.tensor([[[0, len(indices)]]]),
            block_indices=int32(*indices),
            causal=False,
        )
        for a, b in zip(bad, clean, strict=True):
            assert torch.equal(a, b), indices


def test_blocks_past_the_cache_are_skipped(isa: str) -> None:
    call = qkv(torch.float32, seqlen_q=20, seqlen_k=100)
    call["k"][:, :, 50:] = torch.nan
    call["v"][:, :, 50:] = torch.nan
    check_attention(OP, listed(call, full_mask(call, 32, 16), 32, 16) | {"seqused_k": int32(50, 33)})


def test_list_may_start_anywhere() -> None:
    """Offsets are absolute: the first need not be 0, and rows need not follow each other in memory."""
    call = qkv(torch.float32, batch=1, seqlen_q=32, seqlen_k=64) | {"block_size_q": 32, "block_size_k": 16}
    indices = int32(3, 3, 3, 0, 2, 1)
    for heads, indptr in (((0, 2), [[[3, 5]]]), ((1,), [[[5, 6]]])):
        mask = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
        mask[..., list(heads)] = True
        expected = longctx.block_sparse_attention(**listed(call, mask, 32, 16))
        actual = longctx.block_sparse_attention(**call, block_indptr=torch.tensor(indptr), block_indices=indices)
        assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("seed", range(150))
def test_random_combinations(seed: int) -> None:
    check_attention(OP, random_sparse_call(seed))


@pytest.mark.runs_on("cpu", reason="by instruction set: the same calls run without one")
@pytest.mark.parametrize("seed", range(0, 150, 5))
def test_random_combinations_by_isa(isa: str, seed: int) -> None:
    check_attention(OP, random_sparse_call(seed))


def random_sparse_call(seed: int) -> Call:
    rng = random.Random(seed)
    call = random_call(seed)
    return random_blocks(
        call,
        block_size_q=rng.choice(BLOCK_SIZES_Q),
        block_size_k=rng.choice(BLOCK_SIZES_K),
        pattern_heads=rng.choice((1, call["k"].shape[1], call["q"].shape[1])),
        pattern_batch=rng.choice((1, call["q"].shape[0])),
        density=rng.choice((0.1, 0.5, 1.0)),
        seed=seed,
    )
