"""The conventions that hold for every op, one test a row of their table."""

from __future__ import annotations

import inspect
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES
from checks import as_tuple, assert_equal_to_rounding, assert_same_bits, assert_same_result
from longctx.testing import surround_with_nan
from op_case import DTYPES, Call, OpCase, qkv
from prefill_cases import random_blocks

# Address space without memory behind it until a page is touched.
UNTOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE

EVERY_CALL = [
    pytest.param(case, variant, id=f"{case.name}-{variant}") for case in CASES.values() for variant in case.calls
]
for_every_call = pytest.mark.parametrize(("case", "variant"), EVERY_CALL)
for_every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_every_public_op_has_a_case() -> None:
    assert set(CASES) == set(longctx.ops.__all__)


@for_every_op
def test_twin_has_the_same_signature(case: OpCase) -> None:
    op, twin = (
        {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}
        for function in (case.op, case.twin)
    )
    op.pop("validate", None)
    assert list(op.items()) == list(twin.items())


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
        for output in outputs:  # without gaps; rows may come in the order of q's
            assert output.is_contiguous() or output.transpose(1, 2).is_contiguous()


@pytest.mark.sanitize
@for_every_call
def test_strided_inputs_amid_nan(isa: str, case: OpCase, variant: str) -> None:
    """A view into a larger buffer of NaN, in either layout, gives what a contiguous tensor gives."""
    for dtype in case.dtypes:
        call = case.calls[variant](dtype)
        expected = case.op(**call)
        for layout in ("bhsd", "bshd"):
            views = {
                name: surround_with_nan(value, layout=layout)
                for name, value in call.items()
                if is_float(value) and value.dim() == 4 and value.shape[-1] > 1 and name not in ("lse", "lse_override")
            }
            assert_same_result(case.name, case.op(**(call | views)), expected)


@pytest.mark.parametrize("layout", ["pointer", "rows", "both"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("name", ["attention", "block_sparse_attention", "attention_mass", "block_scores"])
def test_misaligned_inputs(name: str, dtype: torch.dtype, head_dim: int, layout: str) -> None:
    """A pointer off by one element, rows an odd number of elements apart: what wide loads and TMA cannot take."""
    case = CASES[name]
    call = qkv(dtype, batch=1, seqlen_q=70, seqlen_k=130, head_dim=head_dim)
    if name == "block_sparse_attention":
        call = random_blocks(call, block_size_q=64, block_size_k=32)
    if name in ("attention_mass", "block_scores"):
        del call["v"]
    expected = case.op(**call)
    pad, first = {"pointer": (8, 1), "rows": (3, 0), "both": (3, 1)}[layout]
    for names in (("q",), ("k",), ("v",), ("q", "k", "v")):
        views = {}
        for argument in set(names) & set(call):
            value = call[argument]
            buffer = value.new_full((*value.shape[:3], head_dim + pad), torch.nan)
            views[argument] = buffer[..., first : first + head_dim].copy_(value)
        assert_same_result(name, case.op(**(call | views)), expected)


@for_every_call
def test_zero_strides(case: OpCase, variant: str) -> None:
    """Broadcast heads and batch entries need no copy."""
    call = case.calls[variant](torch.float32)
    broadcast = {
        name: value[:, :1].expand_as(value) for name, value in call.items() if is_float(value) and value.dim() == 4
    }
    copied = {name: value.contiguous() for name, value in broadcast.items()}
    assert_same_result(case.name, case.op(**(call | broadcast)), case.op(**(call | copied)))


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


@pytest.mark.runs_on("cpu", "cuda", reason="threads: fibers take turns")
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
        assert_equal_to_rounding(case.op(**alone), (out[b : b + 1], lse[b : b + 1]))


@pytest.mark.runs_on("cpu", "simt", reason="addresses beyond 32 bits: of GPU memory in test_cuda.py")
@pytest.mark.parametrize("name", ["attention", "block_sparse_attention", "attention_mass", "block_scores"])
@pytest.mark.parametrize("dim", range(3))
def test_addresses_beyond_32_bits(name: str, dim: int) -> None:
    """Batch entries, heads or rows farther apart than 2^31 elements; pages that nobody touches cost no memory."""
    case = CASES[name]
    call = case.calls["plain"](torch.bfloat16)
    views = {}
    for argument in ("q", "k", "v") if "v" in call else ("q", "k"):
        # Two entries along `dim`, the second one out of reach of an int32 offset.
        near = call[argument].narrow(dim, 0, 2) if name != "block_sparse_attention" or dim < 2 else call[argument]
        far = (2**31 + 64) if near.shape[dim] == 2 else 2**31 // (near.shape[dim] - 1) + 64
        strides = [near.stride(0), near.stride(1), near.stride(2), 1]
        strides[dim] = far
        storage = mmap.mmap(-1, 2 * (far * near.shape[dim] + call[argument].numel()), flags=UNTOUCHED)
        buffer = torch.frombuffer(storage, dtype=torch.bfloat16)
        views[argument] = buffer.as_strided(near.shape, strides).copy_(near)
    call |= {"lse": call["lse"].narrow(dim, 0, 2)} if "lse" in call else {}
    assert_same_bits(case.op(**(call | views)), case.op(**(call | {n: view.contiguous() for n, view in views.items()})))


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
