"""The conventions that hold for every op, one test a row of their table."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES, Call, OpCase, qkv
from longctx.testing import surround_with_nan

EVERY_CALL = [
    pytest.param(case, variant, id=f"{case.name}-{variant}") for case in CASES.values() for variant in case.calls
]
for_every_call = pytest.mark.parametrize(("case", "variant"), EVERY_CALL)
for_every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_every_public_op_has_a_case() -> None:
    assert set(CASES) == set(longctx.ops.__all__)


@for_every_op
def test_twin_has_the_same_signature(case: OpCase) -> None:
    parameters = dict(inspect.signature(case.op).parameters)
    parameters.pop("validate", None)
    assert list(parameters.values()) == list(inspect.signature(case.twin).parameters.values())


@pytest.mark.sanitize
@for_every_call
def test_inputs_are_left_alone_and_outputs_fresh(case: OpCase, variant: str) -> None:
    for dtype in case.dtypes:
        call = case.calls[variant](dtype)
        copies = {name: value.clone() for name, value in call.items() if isinstance(value, Tensor)}
        outputs = as_tuple(case.op(**call))
        for name, copy in copies.items():
            assert torch.equal(call[name], copy), name
        inputs = {call[name].untyped_storage().data_ptr() for name in copies}
        assert inputs.isdisjoint(output.untyped_storage().data_ptr() for output in outputs)
        assert all(output.is_contiguous() for output in outputs)


@pytest.mark.sanitize
@for_every_call
def test_strided_inputs_amid_nan(isa: str, case: OpCase, variant: str) -> None:
    """A view into a larger buffer of NaN, in either layout, gives the bits of a contiguous tensor."""
    for dtype in case.dtypes:
        call = case.calls[variant](dtype)
        expected = case.op(**call)
        for layout in ("bhsd", "bshd"):
            views = {
                name: surround_with_nan(value, layout=layout)
                for name, value in call.items()
                if is_float(value) and value.dim() == 4 and value.shape[-1] > 1 and name not in ("lse", "lse_override")
            }
            assert_same_bits(case.op(**(call | views)), expected)


@for_every_call
def test_zero_strides(case: OpCase, variant: str) -> None:
    """Broadcast heads and batch entries need no copy."""
    call = case.calls[variant](torch.float32)
    broadcast = {
        name: value[:, :1].expand_as(value) for name, value in call.items() if is_float(value) and value.dim() == 4
    }
    copied = {name: value.contiguous() for name, value in broadcast.items()}
    assert_same_bits(case.op(**(call | broadcast)), case.op(**(call | copied)))


@for_every_call
def test_same_bits_on_every_run_and_thread_count(isa: str, case: OpCase, variant: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in case.dtypes:
            call = case.calls[variant](dtype)
            torch.set_num_threads(1)
            expected = case.op(**call)
            for num_threads in (1, 2, 3, 2):
                torch.set_num_threads(num_threads)
                assert_same_bits(case.op(**call), expected)
    finally:
        torch.set_num_threads(before)


@for_every_call
def test_called_from_a_thread(case: OpCase, variant: str) -> None:
    """Scratch memory belongs to threads: calls at the same time do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    calls = [case.calls[variant](dtype) for dtype in case.dtypes] * 4
    expected = [case.op(**call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(lambda call: case.op(**call), calls), expected, strict=True):
            assert_same_bits(actual, wanted)


@for_every_call
def test_dtypes_of_outputs(case: OpCase, variant: str) -> None:
    for dtype in case.dtypes:
        call = case.calls[variant](dtype)
        for output, reference in zip(as_tuple(case.op(**call)), as_tuple(case.twin(**call)), strict=True):
            assert (output.dtype, output.shape, output.device) == (reference.dtype, reference.shape, reference.device)


ATTENTION_OPS = [case for case in CASES.values() if {"q", "k", "v"} <= set(case.differentiable)]


@pytest.mark.parametrize("case", ATTENTION_OPS, ids=lambda case: case.name)
def test_batch_entries_do_not_mix(case: OpCase) -> None:
    call = case.calls["all_options"](torch.float32)
    out, lse = case.op(**call)
    batch = call["q"].shape[0]
    for b in range(batch):
        alone = {
            name: value[b : b + 1] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch else value
            for name, value in call.items()
        }
        out_alone, lse_alone = case.op(**alone)
        torch.testing.assert_close(out_alone[0], out[b])
        torch.testing.assert_close(lse_alone[0], lse[b])


@pytest.mark.parametrize("case", ATTENTION_OPS, ids=lambda case: case.name)
def test_addresses_beyond_32_bits(case: OpCase) -> None:
    """Batch entries, heads and rows farther apart than 2^31 elements; untouched pages cost no memory."""
    call = case.calls["plain"](torch.float32)
    expected = case.op(**call)
    far = 2**31 + 64
    for dim in range(3):
        views = {}
        for name in ("q", "k", "v"):
            value = call[name][:, :, :4] if dim == 2 else call[name]
            strides = [value.stride(0), value.stride(1), value.stride(2), 1]
            strides[dim] = far
            buffer = torch.empty(far * value.shape[dim] + value.numel(), dtype=torch.float32)
            views[name] = buffer.as_strided(value.shape, strides).copy_(value)
        if dim < 2:
            assert_same_bits(case.op(**(call | views)), expected)
    # rows: only `attention` may change its lengths without changing the rest of the call
    if case.name == "attention":
        near = {name: view.contiguous() for name, view in views.items()}
        assert_same_bits(case.op(**views), case.op(**near))


@for_every_op
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes_raise(case: OpCase, dtype: torch.dtype) -> None:
    make = next(iter(case.calls.values()))
    call = make(case.dtypes[0])
    call = {name: value.to(dtype) if is_float(value) else value for name, value in call.items()}
    with pytest.raises((ValueError, TypeError), match=rf"^longctx::{case.name}: `\w+` must have dtype .+; got .+"):
        case.op(**call)


def test_group_of_query_heads_reads_one_kv_head() -> None:
    call: Call = qkv(torch.float32, num_q_heads=6, num_kv_heads=2)
    out, _ = longctx.attention(**call)
    for head in range(6):
        kv_head = slice(head // 3, head // 3 + 1)
        alone, _ = longctx.attention(call["q"][:, head : head + 1], call["k"][:, kv_head], call["v"][:, kv_head])
        torch.testing.assert_close(out[:, head : head + 1], alone)
