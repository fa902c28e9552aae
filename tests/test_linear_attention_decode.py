"""linear_attention_decode against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longctx
from checks import assert_same_bits, in_float64, record
from linear_cases import linear
from longctx import reference
from longctx.testing import surround_with_nan
from op_case import DTYPES, Call, int32, randn
from test_linear_attention import HEAD_DIMS, TOLERANCE, relative_error


def decode_call(dtype: torch.dtype, num_tokens: int, **options: Any) -> Call:
    call = linear(dtype, decay=(4,), num_states=2, seqlen_q=num_tokens, seqlen_k=num_tokens, **options)
    return call | {"state": call.pop("initial_state")}


def check_decode(call: Call) -> None:
    state, exact_state = call["state"].clone(), call["state"].double()
    out = longctx.linear_attention_decode(**call | {"state": state})
    exact = reference.linear_attention_decode(**in_float64(call) | {"state": exact_state})
    dtype = call["q"].dtype
    # Nothing but the output is rounded to 16 bits.
    assert relative_error(out, exact) <= TOLERANCE[dtype]
    assert relative_error(state, exact_state) <= min(TOLERANCE[dtype], TOLERANCE[torch.float32])
    record("linear_attention_decode", dtype, call["q"].shape[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_decode(isa: str, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> None:
    for num_tokens in (1, 3):
        check_decode(decode_call(dtype, num_tokens, head_dim=head_dim, head_dim_v=head_dim_v))
    check_decode(decode_call(dtype, 2, head_dim=head_dim, head_dim_v=head_dim_v, normalize=True) | {"normalize": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_equals_decode_step_by_step(isa: str, dtype: torch.dtype) -> None:
    call = linear(dtype, decay=(4,), num_states=2, seqlen_q=100, seqlen_k=100, head_dim=32)
    out, final_state = longctx.linear_attention(**call)
    state = call.pop("initial_state").clone()
    steps = [
        longctx.linear_attention_decode(*(call[name][:, :, t : t + 1] for name in "qkv"), call["log_decay"], state)
        for t in range(100)
    ]
    assert relative_error(torch.cat(steps, dim=2), out) <= 2 * TOLERANCE[dtype]
    assert relative_error(state, final_state) <= TOLERANCE[dtype]


@pytest.mark.sanitize
def test_slots_of_a_pool(isa: str) -> None:
    call = decode_call(torch.float32, 2)
    pool = randn(5, 4, 16, 16, seed=7)
    used = pool.clone()
    out = longctx.linear_attention_decode(**call | {"state": used, "state_indices": int32(3, -1)})
    alone = pool[3:4].clone()
    first = {name: call[name][:1] for name in "qkv"} | {"log_decay": call["log_decay"]}
    assert_same_bits(out[:1], longctx.linear_attention_decode(**first, state=alone))
    assert_same_bits(used[3:4], alone)
    assert not out[1].any()
    for slot in (0, 1, 2, 4):
        assert_same_bits(used[slot], pool[slot])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_commit_keeps_the_first_tokens(isa: str, dtype: torch.dtype) -> None:
    call = decode_call(dtype, 4)
    whole = call["state"].clone()
    out = longctx.linear_attention_decode(**call | {"state": whole})
    for kept in range(5):
        state = call["state"].clone()
        draft = longctx.linear_attention_decode(**call | {"state": state, "commit": int32(kept, 4)})
        assert_same_bits(draft, out)
        expected = call["state"].clone()
        if kept:
            first = {name: call[name][:, :, :kept] for name in "qkv"} | {"log_decay": call["log_decay"]}
            longctx.linear_attention_decode(**first, state=expected)
        assert_same_bits(state[0], expected[0])
        assert_same_bits(state[1], whole[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strided_state_amid_nan(isa: str, layout: Any) -> None:
    call = decode_call(torch.float32, 2, head_dim_v=24)
    state = call["state"].clone()
    expected = longctx.linear_attention_decode(**call | {"state": state})
    view = surround_with_nan(call["state"], layout=layout)
    assert_same_bits(longctx.linear_attention_decode(**call | {"state": view}), expected)
    assert_same_bits(view, state)


@pytest.mark.runs_on("cuda", "simt", reason="about the CUDA kernels: --device cuda or --simt")
def test_limits_on_cuda() -> None:
    rule = "longctx::linear_attention_decode: `q` must "
    with pytest.raises(ValueError, match=rule + "have dtype float32, bfloat16 or float16 on CUDA; got float64"):
        longctx.linear_attention_decode(**decode_call(torch.float64, 1))
    with pytest.raises(ValueError, match=rule + "have a head_dim of at most 256 on CUDA; got 300"):
        longctx.linear_attention_decode(**decode_call(torch.float32, 1, head_dim=300))
    check_decode(decode_call(torch.float32, 1, head_dim=64, head_dim_v=300))


def test_decode_refuses_gradients() -> None:
    call = decode_call(torch.float32, 1)
    for name in ("q", "k", "v", "log_decay", "state"):
        needs = {name: call[name].clone().requires_grad_()}
        with pytest.raises(NotImplementedError, match="longctx::linear_attention_decode"):
            longctx.linear_attention_decode(**call | needs)
        with torch.no_grad():
            longctx.linear_attention_decode(**call | needs)
