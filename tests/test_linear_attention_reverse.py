"""The reversed sweep of linear attention, and outputs that are not rounded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import longctx
from checks import assert_same_bits, in_float64
from linear_cases import linear
from longctx import reference
from longctx.testing import surround_with_nan
from op_case import DTYPES, Call, int32, qkv
from test_linear_attention import DECAYS, HEAD_DIMS, LENGTHS, TOLERANCE, check, relative_error


def decay_shape(per_token: bool, length: int, batch: int = 2) -> tuple[int, ...]:
    return (batch, 4, length) if per_token else (4,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> None:
    sizes = {"seqlen_q": 150, "seqlen_k": 150, "head_dim": head_dim, "head_dim_v": head_dim_v}
    check(linear(dtype, decay=(4,), num_states=2, **sizes), reverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("per_token", [False, True])
def test_lengths(isa: str, dtype: torch.dtype, length: int, per_token: bool) -> None:
    sizes = {"seqlen_q": length, "seqlen_k": length, "head_dim": 40, "head_dim_v": 72}
    check(linear(dtype, decay=decay_shape(per_token, length), num_states=2, **sizes), reverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_no_decay_overflows(isa: str, dtype: torch.dtype, decay: float, per_token: bool) -> None:
    call = qkv(dtype, seqlen_q=200, seqlen_k=200, head_dim=32)
    log_decay = torch.full(decay_shape(per_token, 200), -decay)
    out, state = check(call, log_decay=log_decay, reverse=True)
    assert out.isfinite().all()
    assert state.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [None, (4,), (2, 4, 150)])
def test_normalize(isa: str, dtype: torch.dtype, decay: tuple[int, ...] | None) -> None:
    sizes = {"seqlen_q": 150, "seqlen_k": 150, "head_dim": 32, "head_dim_v": 64}
    call = linear(dtype, decay=decay or (4,), normalize=True, num_states=2, **sizes)
    if decay is None:
        call["log_decay"] = None
    check(call, normalize=True, reverse=True, scale=0.5, eps=0.1)


def flipped(call: Call) -> Call:
    """The forward call of the same sums: tokens backwards, each with the decay of the token behind it."""
    log_decay = call["log_decay"]
    if log_decay.dim() == 3:
        log_decay = torch.cat([torch.zeros_like(log_decay[:, :, :1]), log_decay.flip(2)[:, :, :-1]], dim=2)
    return call | {name: call[name].flip(2) for name in "qkv"} | {"log_decay": log_decay}


@pytest.mark.runs_on("cpu", reason="float64: on CUDA in merge_states alone")
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_equals_the_forward_sweep_over_flipped_tokens(per_token: bool, length: int) -> None:
    call = linear(torch.float64, decay=decay_shape(per_token, length), seqlen_q=length, seqlen_k=length)
    out, state = longctx.linear_attention(**call, reverse=True)
    expected, last = longctx.linear_attention(**flipped(call))
    torch.testing.assert_close(out, expected.flip(2))
    log_decay = call["log_decay"]
    first = log_decay[:, :, 0] if per_token else log_decay
    torch.testing.assert_close(state, first.double().exp()[..., None, None] * last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_is_the_adjoint(isa: str, dtype: torch.dtype, per_token: bool) -> None:
    """`<w, A v> = <A^T w, v>`: what row i reads of key j forwards, row j reads of key i backwards."""
    call = linear(dtype, decay=decay_shape(per_token, 150), num_q_heads=2, seqlen_q=150, seqlen_k=150, batch=1)
    call["log_decay"] = call["log_decay"][:1, :2] if per_token else call["log_decay"][:2]
    w = qkv(dtype, num_q_heads=2, seqlen_q=150, batch=1, seed=9)["q"]
    out, _ = longctx.linear_attention(**call, wide_out=True)
    back, _ = longctx.linear_attention(call["k"], call["q"], w, call["log_decay"], reverse=True, wide_out=True)
    forwards, backwards = (w.double() * out).sum(), (back.double() * call["v"]).sum()
    assert abs(forwards - backwards) <= 2 * TOLERANCE[dtype] * w.double().norm() * out.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_one_by_one(isa: str, dtype: torch.dtype) -> None:
    offsets = [0, 0, 17, 81, 81, 230, 290]
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "head_dim": 32}
    call = linear(dtype, decay=(1, 4, 300), num_states=6, **sizes)
    out, state = check(call, cu_seqlens=int32(*offsets), reverse=True, num_segments=1)
    for s, (begin, end) in enumerate(itertools.pairwise(offsets)):
        rows = slice(begin, end)
        alone = {name: call[name][:, :, rows] for name in ("q", "k", "v", "log_decay")}
        alone |= {"initial_state": call["initial_state"][s : s + 1]}
        result = longctx.linear_attention(**alone, reverse=True, num_segments=1)
        assert_same_bits(result, (out[:, :, rows], state[s : s + 1]))
    assert not out[:, :, 290:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [64, 192])
@pytest.mark.parametrize("per_token", [False, True])
def test_split_on_chunks_resumes_bitwise(isa: str, dtype: torch.dtype, split: int, per_token: bool) -> None:
    call = linear(dtype, decay=decay_shape(per_token, 250), seqlen_q=250, seqlen_k=250, head_dim=48)
    options = {"reverse": True, "num_segments": 1}
    out, state = longctx.linear_attention(**call, **options)
    first, second = [
        {name: value[:, :, rows] if value.dim() > 1 else value for name, value in call.items()}
        for rows in (slice(0, split), slice(split, 250))
    ]
    late, between = longctx.linear_attention(**second, **options)
    early, end = longctx.linear_attention(**first, initial_state=between, **options)
    assert_same_bits((torch.cat([early, late], dim=2), end), (out, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_segments", [1, 2, 3, 100])
@pytest.mark.parametrize("per_token", [False, True])
def test_segments_agree(isa: str, dtype: torch.dtype, num_segments: int, per_token: bool) -> None:
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300}
    call = linear(dtype, decay=decay_shape(per_token, 300, batch=1), num_states=1, **sizes)
    check(call, num_segments=num_segments, reverse=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strided_inputs_amid_nan(isa: str, dtype: torch.dtype, layout: Any) -> None:
    call = linear(dtype, decay=(2, 4, 150), seqlen_q=150, seqlen_k=150, head_dim=64, head_dim_v=24)
    views = {name: surround_with_nan(call[name], layout=layout) for name in "qkv"}
    options = {"reverse": True, "wide_out": True}
    assert_same_bits(longctx.linear_attention(**call | views, **options), longctx.linear_attention(**call, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_sees_the_past(isa: str, dtype: torch.dtype) -> None:
    call = linear(dtype, decay=(4,), seqlen_q=150, seqlen_k=150)
    out, _ = longctx.linear_attention(**call, reverse=True)
    for name in ("k", "v"):
        changed = call[name].clone()
        changed[:, :, :50] = 1e4
        again, _ = longctx.linear_attention(**call | {name: changed}, reverse=True)
        assert_same_bits(again[:, :, 50:], out[:, :, 50:])


def test_needs_causal() -> None:
    call = linear(torch.float32, decay=(4,), seqlen_q=75, seqlen_k=75)
    with pytest.raises(ValueError, match="longctx::linear_attention: `reverse` must be False unless `causal`"):
        longctx.linear_attention(**call, causal=False, reverse=True)


# ---- states before chunks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 64, 65, 150])
@pytest.mark.parametrize("decay", [None, (4,), "per token"])
def test_chunk_states(isa: str, dtype: torch.dtype, length: int, decay: Any) -> None:
    shape = decay_shape(decay == "per token", length)
    call = linear(dtype, decay=shape, num_states=2, seqlen_q=length, seqlen_k=length, head_dim=40, head_dim_v=24)
    if decay is None:
        call["log_decay"] = None
    q = call.pop("q")
    states = longctx.linear_attention_states(**call, reverse=True)
    exact = reference.linear_attention_states(**in_float64(call), reverse=True)
    assert states.shape == exact.shape
    assert relative_error(states, exact) <= TOLERANCE[dtype]
    if length:
        _, last = longctx.linear_attention(q, **call, reverse=True, num_segments=1)
        assert_same_bits(states[:, :, 0], last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_states_of_packed_sequences(isa: str, dtype: torch.dtype) -> None:
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "num_q_heads": 2}
    call = linear(dtype, decay=(1, 2, 300), num_states=4, normalize=True, **sizes)
    del call["q"]
    call |= {"cu_seqlens": int32(0, 70, 70, 200, 290), "normalize": True, "reverse": True}
    states = longctx.linear_attention_states(**call)
    exact = reference.linear_attention_states(**in_float64(call))
    assert relative_error(states, exact) <= TOLERANCE[dtype]
    assert not states[:, :, 7:].any()  # 2 + 0 + 3 + 2 chunks are owned


# ---- outputs that are not rounded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"causal": False}], ids=str)
def test_wide_out_rounds_to_out(isa: str, dtype: torch.dtype, normalize: bool, options: Call) -> None:
    """The same sums; one more rounding where an engine scales rows on the way out."""
    sizes = {"seqlen_q": 150, "seqlen_k": 150, "head_dim": 40, "head_dim_v": 72}
    call = linear(dtype, decay=(4,), num_states=2, normalize=normalize, **sizes) | options
    call |= {"scale": 0.3, "normalize": normalize}
    out, state = longctx.linear_attention(**call)
    wide, wide_state = longctx.linear_attention(**call, wide_out=True)
    assert wide.dtype == torch.promote_types(dtype, torch.float32)
    assert_same_bits(wide_state, state)
    torch.testing.assert_close(wide.to(dtype), out)
    exact, _ = reference.linear_attention(**in_float64(call))
    assert relative_error(wide, exact) <= relative_error(out, exact)


def test_wide_out_of_rows_that_no_sequence_owns() -> None:
    call = linear(torch.bfloat16, decay=(4,), batch=1, seqlen_q=90, seqlen_k=90) | {"cu_seqlens": int32(3, 70)}
    out, _ = longctx.linear_attention(**call, wide_out=True)
    assert out[:, :, 3:70].any()
    for rows in (out[:, :, :3], out[:, :, 70:]):
        assert_same_bits(rows, torch.zeros_like(rows))


@pytest.mark.runs_on("cpu", reason="operands of products are float16 on CUDA")
def test_wide_out_is_not_rounded_to_16_bits(isa: str) -> None:
    """float16 products are nearly those of float32: only the output loses digits."""
    call = linear(torch.float16, decay=(4,), seqlen_q=150, seqlen_k=150, head_dim=64)
    exact, _ = reference.linear_attention(**in_float64(call))
    out, _ = longctx.linear_attention(**call, wide_out=True)
    assert relative_error(out, exact) <= 2e-5
