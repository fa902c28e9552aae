"""linear_attention and its chunk states against the recurrence in float64."""

from __future__ import annotations

import itertools
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_same_bits, in_float64, record
from linear_cases import linear
from longctx import reference
from op_case import DTYPES, Call, int32, qkv

# Relative root mean square error against the recurrence in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}
HEAD_DIMS = ((1, 1), (7, 40), (64, 64), (128, 128), (96, 128), (256, 80), (300, 129))
# Around the chunk of 64 tokens and the half chunk of the tile kernels.
LENGTHS = (0, 1, 31, 33, 63, 64, 65, 127, 130, 257)
DECAYS = (0.0, 1e-5, 0.5, 7.5, 40.0, float("inf"))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    norm = float(exact.norm())
    error = float((actual.double() - exact).norm())
    return error / norm if norm > 0 else error


def check(call: Call, **keywords: Any) -> tuple[Tensor, Tensor]:
    call = call | keywords
    out, state = longctx.linear_attention(**call)
    exact_out, exact_state = reference.linear_attention(**in_float64(call))
    assert out.dtype == call["q"].dtype
    assert state.dtype == torch.promote_types(out.dtype, torch.float32)
    for name, actual, exact in (("out", out, exact_out), ("state", state, exact_state)):
        assert actual.shape == exact.shape
        assert relative_error(actual, exact) <= TOLERANCE[out.dtype], f"{name}: {relative_error(actual, exact):.1e}"
    record("linear_attention", out.dtype, call["q"].shape[3])
    return out, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> None:
    sizes = {"seqlen_q": 150, "seqlen_k": 150, "head_dim": head_dim, "head_dim_v": head_dim_v}
    check(linear(dtype, decay=(4,), num_states=2, **sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(isa: str, dtype: torch.dtype, length: int) -> None:
    sizes = {"seqlen_q": length, "seqlen_k": length, "head_dim": 40, "head_dim_v": 72}
    check(linear(dtype, decay=(4,), num_states=2, **sizes))
    check(linear(dtype, decay=(2, 4, length), **sizes))
    check(linear(dtype, decay=(4,), num_states=2, **sizes), causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_no_decay_overflows(isa: str, dtype: torch.dtype, decay: float, per_token: bool) -> None:
    call = qkv(dtype, seqlen_q=200, seqlen_k=200, head_dim=32)
    log_decay = torch.full((2, 4, 200) if per_token else (4,), -decay)
    for causal in (True, False):
        out, state = check(call, log_decay=log_decay, causal=causal)
        assert out.isfinite().all()
        assert state.isfinite().all()


def test_infinite_decay_is_memoryless() -> None:
    call = qkv(torch.float32, seqlen_q=70, seqlen_k=70)
    for causal in (True, False):
        out, _ = longctx.linear_attention(**call, log_decay=torch.full((4,), -torch.inf), causal=causal)
        k, v = (call[name].repeat_interleave(2, dim=1) for name in "kv")
        torch.testing.assert_close(out, (call["q"] * k).sum(-1, keepdim=True) * v)


def test_decays_of_very_different_size() -> None:
    """Differences of sums are taken in double: a strong decay early on costs later weights no digit."""
    call = qkv(torch.float32, seqlen_q=64, seqlen_k=64)
    log_decay = -0.01 * torch.ones(2, 4, 64)
    log_decay[:, :, :20] = -500.0
    check(call, log_decay=log_decay)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [None, (4,), (2, 4, 150)])
def test_normalize(isa: str, dtype: torch.dtype, causal: bool, decay: tuple[int, ...] | None) -> None:
    sizes = {"seqlen_q": 150, "seqlen_k": 150, "head_dim": 32, "head_dim_v": 64}
    call = linear(dtype, decay=decay or (4,), normalize=True, num_states=2, **sizes)
    if decay is None:
        call["log_decay"] = None
    check(call, normalize=True, causal=causal, scale=0.5, eps=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(37, 75), (150, 75), (0, 75), (75, 0), (64, 128), (200, 64), (1, 1)])
@pytest.mark.parametrize("decay", [None, (4,)])
def test_cross(isa: str, dtype: torch.dtype, lengths: tuple[int, int], decay: tuple[int, ...] | None) -> None:
    call = linear(dtype, decay=decay or (4,), num_states=2, seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim_v=24)
    if decay is None:
        call["log_decay"] = None
    check(call, causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_one_by_one(isa: str, dtype: torch.dtype, causal: bool) -> None:
    offsets = [0, 0, 17, 81, 81, 230, 300]
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "head_dim": 32}
    call = linear(dtype, decay=(1, 4, 300), num_states=6, **sizes)
    out, state = check(call, cu_seqlens=int32(*offsets), causal=causal, num_segments=1)
    for s, (begin, end) in enumerate(itertools.pairwise(offsets)):
        rows = slice(begin, end)
        alone = {name: call[name][:, :, rows] for name in ("q", "k", "v", "log_decay")}
        result = longctx.linear_attention(
            **alone, initial_state=call["initial_state"][s : s + 1], causal=causal, num_segments=1
        )
        assert_same_bits(result, (out[:, :, rows], state[s : s + 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [64, 128, 192])
@pytest.mark.parametrize("per_token", [False, True])
def test_split_on_chunks_resumes_bitwise(isa: str, dtype: torch.dtype, split: int, per_token: bool) -> None:
    call = linear(dtype, decay=(2, 4, 250) if per_token else (4,), seqlen_q=250, seqlen_k=250, head_dim=48)
    out, state = longctx.linear_attention(**call, num_segments=1)
    halves = [
        {name: value[:, :, rows] if value.dim() > 1 else value for name, value in call.items()}
        for rows in (slice(0, split), slice(split, 250))
    ]
    first, between = longctx.linear_attention(**halves[0], num_segments=1)
    second, last = longctx.linear_attention(**halves[1], initial_state=between, num_segments=1)
    assert_same_bits((torch.cat([first, second], dim=2), last), (out, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_segments", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("per_token", [False, True])
def test_segments_agree(isa: str, dtype: torch.dtype, num_segments: int, per_token: bool) -> None:
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300}
    call = linear(dtype, decay=(1, 4, 300) if per_token else (4,), num_states=1, **sizes)
    check(call, num_segments=num_segments)


@pytest.mark.runs_on("cpu", reason="thread counts: of the CPU kernels")
def test_few_heads_take_more_threads() -> None:
    """0 segments cut a long sequence where threads would idle; the result agrees to rounding."""
    call = linear(torch.float32, decay=(1,), batch=1, num_q_heads=1, num_kv_heads=1, seqlen_q=4096, seqlen_k=4096)
    call["log_decay"] = torch.tensor([-0.01])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parallel = longctx.linear_attention(**call)
        assert_same_bits(parallel, longctx.linear_attention(**call, num_segments=2))
    finally:
        torch.set_num_threads(before)
    for actual, expected in zip(parallel, longctx.linear_attention(**call, num_segments=1), strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"wide_out": True}, {"normalize": True, "reverse": True}])
def test_out_lies_like_q(isa: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Rows of heads side by side come back so, and the numbers are those of any other order."""
    call = linear(dtype, decay=(4,), seqlen_q=130, seqlen_k=130, head_dim_v=24)
    out, _ = longctx.linear_attention(**call, **options)
    assert out.is_contiguous()
    rows_first = {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    again, _ = longctx.linear_attention(**call | rows_first, **options)
    assert again.transpose(1, 2).is_contiguous()
    assert_same_bits(again, out)


@pytest.mark.parametrize("causal", [True, False])
def test_addresses_beyond_32_bits(causal: bool) -> None:
    """Heads farther apart than 2^31 elements; pages that nobody touches cost no memory."""
    call = linear(torch.bfloat16, decay=(2,), num_q_heads=2, seqlen_q=70, seqlen_k=70, batch=1)
    far, views = 2**31 + 64, {}
    for name in "qkv":
        storage = mmap.mmap(-1, 4 * far, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        strides = (0, far, call[name].stride(2), 1)
        views[name] = torch.frombuffer(storage, dtype=torch.bfloat16).as_strided(call[name].shape, strides)
        views[name].copy_(call[name])
    assert_same_bits(
        longctx.linear_attention(**call | views, causal=causal), longctx.linear_attention(**call, causal=causal)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_sees_the_future(isa: str, dtype: torch.dtype) -> None:
    call = linear(dtype, decay=(4,), seqlen_q=150, seqlen_k=150)
    out, _ = longctx.linear_attention(**call, num_segments=1)
    for name in ("k", "v"):
        changed = call[name].clone()
        changed[:, :, 100:] = 1e4
        again, _ = longctx.linear_attention(**call | {name: changed}, num_segments=1)
        assert_same_bits(again[:, :, :100], out[:, :, :100])


# ---- states at the ends of chunks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 64, 65, 150])
@pytest.mark.parametrize("decay", [None, (4,), "per token"])
def test_chunk_states(isa: str, dtype: torch.dtype, length: int, decay: Any) -> None:
    shape = (2, 4, length) if decay == "per token" else (4,)
    call = linear(dtype, decay=shape, num_states=2, seqlen_q=length, seqlen_k=length, head_dim=40, head_dim_v=24)
    if decay is None:
        call["log_decay"] = None
    q = call.pop("q")
    states = longctx.linear_attention_states(**call)
    exact = reference.linear_attention_states(**in_float64(call))
    assert states.shape == exact.shape
    assert relative_error(states, exact) <= TOLERANCE[dtype]
    record("linear_attention_states", dtype, 40)
    if length:
        _, last = longctx.linear_attention(q, **call, num_segments=1)
        assert_same_bits(states[:, :, -1], last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_states_of_packed_sequences(isa: str, dtype: torch.dtype) -> None:
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "num_q_heads": 2}
    call = linear(dtype, decay=(1, 2, 300), num_states=4, normalize=True, **sizes)
    del call["q"]
    call |= {"cu_seqlens": int32(0, 70, 70, 200, 290), "normalize": True}
    states = longctx.linear_attention_states(**call)
    exact = reference.linear_attention_states(**in_float64(call))
    assert relative_error(states, exact) <= TOLERANCE[dtype]
    assert not states[:, :, 7:].any()  # 2 + 0 + 3 + 2 chunks are owned
    assert states.shape[2] == 9


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states_of_one_head_and_more_threads(reverse: bool) -> None:
    """One sweep writes them all, where `linear_attention` would cut the sequence into segments."""
    call = linear(torch.float32, decay=(1,), batch=1, num_q_heads=1, num_kv_heads=1, seqlen_q=4096, seqlen_k=4096)
    del call["q"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parallel = longctx.linear_attention_states(**call, reverse=reverse)
        torch.set_num_threads(1)
        assert_same_bits(parallel, longctx.linear_attention_states(**call, reverse=reverse))
    finally:
        torch.set_num_threads(before)
