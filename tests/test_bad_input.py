"""Bad arguments: one error of one form before any work; bad values without `validate`: no harm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES
from checks import as_tuple, assert_same_bits
from op_case import INT32_MAX, INT64_MAX, Call, OpCase, generator

Change = tuple[str, str, Any]  # what is wrong, the argument, its new value


def resized(name: str, tensor: Tensor) -> Iterator[Change]:
    """The tensor with one more and with no element along each dim."""
    for dim, size in enumerate(tensor.shape):
        for label, new_size in (("+1", size + 1), ("=0", 0)):
            shape = [*tensor.shape[:dim], new_size, *tensor.shape[dim + 1 :]]
            yield f"{name}.size({dim}){label}", name, torch.zeros(shape, dtype=tensor.dtype)


def misshaped(name: str, tensor: Tensor) -> Iterator[Change]:
    yield f"{name} with one more dim", name, tensor[None]
    yield f"{name} with one dim less", name, tensor[0]
    yield f"{name} without dims", name, tensor.flatten()[0]
    yield f"{name} huge in its first dim", name, tensor[:1].expand(2**40, *tensor.shape[1:])


def mistyped(name: str, tensor: Tensor) -> Iterator[Change]:
    wrong = {torch.float32: (torch.float64, torch.bfloat16), torch.int32: (torch.int64,), torch.int64: (torch.int32,)}
    for dtype in (*wrong.get(tensor.dtype, ()), torch.uint8, torch.complex64, torch.bool):
        if dtype != tensor.dtype:
            yield f"{name} of dtype {dtype}", name, tensor.to(dtype)


def restrided(name: str, tensor: Tensor, case: OpCase) -> Iterator[Change]:
    if name not in case.any_strides and tensor.shape[-1] > 1:
        yield f"{name} strided in its last dim", name, tensor.repeat_interleave(2, dim=-1)[..., ::2]
        yield f"{name} overlapping in its last dim", name, tensor[..., :1].expand_as(tensor)


def calls_of(case: OpCase) -> Iterator[tuple[str, Call]]:
    """The calls in which every axis is fixed by more than one argument."""
    for variant, make in case.calls.items():
        if variant != "plain" or len(case.calls) == 1 or case.name == "merge_states":
            yield variant, make(torch.float32)


def bad_tensors() -> Iterator[Any]:
    for case in CASES.values():
        for variant, call in calls_of(case):
            for name, value in call.items():
                if not isinstance(value, Tensor):
                    continue
                changes = [*misshaped(name, value), *mistyped(name, value), *restrided(name, value, case)]
                changes.append((f"{name} on another device", name, value.to("meta")))
                changes += resized(name, value)
                for label, argument, changed in changes:
                    if f"{variant}: {label}" in case.legal_changes:
                        continue
                    yield pytest.param(case, call | {argument: changed}, id=f"{case.name}-{variant}-{label}")


def bad_options(table: str) -> Iterator[Any]:
    for case in CASES.values():
        variant, call = next(iter(calls_of(case)))
        for name, values in getattr(case, table).items():
            for value in values:
                yield pytest.param(case, call | {name: value}, name, id=f"{case.name}-{variant}-{name}={value}")


def assert_raises_in_form(case: OpCase, call: Call, argument: str | None = None, **keywords: Any) -> None:
    """The error names the op and an argument, and says the rule and what was given."""
    copies = {name: value.clone() for name, value in call.items() if isinstance(value, Tensor) and value.numel() < 1e6}
    with pytest.raises((ValueError, TypeError)) as caught:
        case.public(**call, **keywords)
    form = re.fullmatch(rf"longctx::{case.name}: `(\w+)` must .+; got .+", str(caught.value), re.DOTALL)
    assert form, f"not in the form of an argument error: {caught.value}"
    assert "\n" not in str(caught.value)
    assert form[1] == argument if argument else form[1] in call
    for name, copy in copies.items():
        if copy.device.type != "meta":
            torch.testing.assert_close(call[name], copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "call"), list(bad_tensors()))
def test_bad_tensor(case: OpCase, call: Call) -> None:
    assert_raises_in_form(case, call)


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "call", "argument"), list(bad_options("illegal")))
def test_bad_option(case: OpCase, call: Call, argument: str) -> None:
    assert_raises_in_form(case, call, argument)


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "call", "argument"), list(bad_options("extreme")))
def test_extreme_option(case: OpCase, call: Call, argument: str) -> None:
    for actual, expected in zip(as_tuple(case.op(**call)), as_tuple(case.twin(**call)), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text: f"{argument}: {text}")


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if "packed" in case.calls], ids=lambda case: case.name
)
def test_arguments_that_exclude_each_other(case: OpCase) -> None:
    packed = case.calls["packed"](torch.float32)
    if "cu_seqlens_q" in packed:
        assert_raises_in_form(case, packed | {"cu_seqlens_q": None})
        assert_raises_in_form(case, packed | {"cu_seqlens_k": None})
        assert_raises_in_form(case, packed | {"seqused_k": torch.zeros(1, dtype=torch.int32)})
    floats = {name: value for name, value in packed.items() if isinstance(value, Tensor) and value.is_floating_point()}
    twice = {name: value.expand(2, *value.shape[1:]) for name, value in floats.items()}
    assert_raises_in_form(case, packed | twice, next(iter(floats)))
    if "v" in packed and "cu_seqlens_q" in packed:
        plain = case.calls["plain"](torch.float32)
        assert_raises_in_form(case, plain | {"page_table": torch.zeros(2, 1, dtype=torch.int32)}, "page_table")


@pytest.mark.parametrize("argument", ["causal", "softcap", "window_size_left"])
def test_option_of_another_type(argument: str) -> None:
    """Python's own conversion rejects it, naming the op and the argument."""
    case = CASES["attention"]
    with pytest.raises((TypeError, RuntimeError), match=rf"(?s)longctx::attention.*{argument}"):
        case.op(**case.calls["plain"](torch.float32), **{argument: "wide"})


def invalid_calls() -> Iterator[Any]:
    for case in CASES.values():
        for why, invalid in case.invalid.items():
            call = case.calls[invalid.variant](torch.float32) | {invalid.argument: invalid.value}
            yield pytest.param(case, call, invalid.argument, id=f"{case.name}-{why}")


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "call", "argument"), list(invalid_calls()))
def test_validate_rejects_bad_values(case: OpCase, call: Call, argument: str) -> None:
    assert_raises_in_form(case, call, argument, validate=True)
    case.op(**call)  # without validate: skipped or clamped


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.invalid], ids=lambda case: case.name)
def test_validate_accepts_good_values(case: OpCase) -> None:
    for make in case.calls.values():
        call = make(torch.float32)
        assert_same_bits(case.op(**call, validate=True), case.op(**call))


def garbage(tensor: Tensor, seed: int) -> Tensor:
    """Values that no index tensor should hold, mixed with some that it may."""
    largest = INT64_MAX if tensor.dtype == torch.int64 else INT32_MAX
    choices = torch.tensor([0, 1, 5, 37, 75, 80, 1000, -1, -2, -1000, largest, -largest - 1, largest - 1, INT32_MAX])
    pick = torch.randint(0, len(choices), tensor.shape, generator=generator(seed))
    uniform = torch.randint(-largest - 1, largest, tensor.shape, generator=generator(seed + 1), dtype=torch.int64)
    near = tensor + torch.randint(-2, 3, tensor.shape, generator=generator(seed + 2))
    return (choices[pick], uniform, near, choices[pick].sort(dim=-1).values)[seed % 4].to(tensor.dtype)


def is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_garbage_values_do_no_harm(isa: str, case: OpCase, seed: int) -> None:
    """Outputs are still whole and written everywhere; a sanitizer sees reads outside the tensors."""
    dtype = case.dtypes[seed % len(case.dtypes)]
    for make in case.calls.values():
        call = make(dtype)
        indices = {name: value for name, value in call.items() if is_index(value) and name not in case.zeros}
        for chosen in ([name] for name in indices) if seed % 3 else (list(indices),):
            bad = call | {name: garbage(indices[name], seed) for name in chosen}
            for output in as_tuple(case.op(**bad)):
                assert not output.isnan().any(), f"{chosen}: NaN"
                assert not torch.isposinf(output.float()).any(), f"{chosen}: infinity"
