"""Every op as torch sees it: schema, fake kernel, autograd registration, torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import target
from cases import CASES
from checks import as_tuple, assert_same_bits, record
from op_case import Call, OpCase
from test_conventions import for_every_call


class Recorder(TorchDispatchMode):
    """Collects the calls that reach the dispatcher under `torch.ops.longctx`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "longctx":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@for_every_call
def test_opcheck(case: OpCase, variant: str) -> None:
    with Recorder() as recorder:
        case.op(**target.native(case.calls[variant](case.dtypes[0])))
    assert recorder.calls, "no op of longctx was called"
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)


@for_every_call
def test_compiled_gives_the_same_numbers(case: OpCase, variant: str) -> None:
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    for dtype in case.dtypes[:3]:
        call = target.native(case.calls[variant](dtype))
        assert_same_bits(compiled(**call), case.op(**call))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled_by_inductor(case: OpCase) -> None:
    call = target.native(next(iter(case.calls.values()))(case.dtypes[0]))
    assert_same_bits(torch.compile(case.op, fullgraph=True)(**call), case.op(**call))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dynamic_shapes_compile_once(case: OpCase) -> None:
    """One graph serves every length."""
    compiled = torch.compile(case.op, fullgraph=True, dynamic=True, backend="aot_eager")
    call = target.native(case.calls["plain"](torch.float32))
    assert_same_bits(compiled(**call), case.op(**call))
    longer = call | {name: torch.cat([call[name]] * 2, dim=dim) for name, dim in case.growing.items()}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same_bits(compiled(**longer), case.op(**longer))


@for_every_call
def test_fake_kernel(case: OpCase, variant: str) -> None:
    """Shapes, dtypes and strides without running: on meta tensors."""
    for dtype in case.dtypes:
        call = case.calls[variant](dtype)
        meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in call.items()}
        for fake, real in zip(as_tuple(case.op(**meta)), as_tuple(case.op(**call)), strict=True):
            assert fake.device.type == "meta"
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


RAISING = [case for case in CASES.values() if case.differentiable and not case.has_backward]
TRAINABLE = [
    pytest.param(case, variant, id=f"{case.name}-{variant}")
    for case in CASES.values()
    if case.has_backward
    for variant in case.calls
]


def requiring_gradients(case: OpCase, call: Call) -> tuple[Call, list[Tensor]]:
    """`call` with its differentiable arguments as leaves, and these."""
    leaves = {name: call[name].clone().requires_grad_() for name in case.differentiable if name in call}
    return call | leaves, list(leaves.values())


@pytest.mark.parametrize(("case", "variant"), TRAINABLE)
def test_opcheck_with_gradients(case: OpCase, variant: str) -> None:
    """AOT autograd traces the backward too, with fixed and with dynamic shapes."""
    call, _ = requiring_gradients(case, target.native(case.calls[variant](case.dtypes[0])))
    with Recorder() as recorder, torch.no_grad():
        case.op(**call)
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize(("case", "variant"), TRAINABLE)
def test_compiled_gives_the_same_gradients(case: OpCase, variant: str) -> None:
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    for dtype in case.dtypes[:3]:
        call = target.native(case.calls[variant](dtype))
        gradients = []
        for op in (compiled, case.op):
            arguments, leaves = requiring_gradients(case, call)
            loss = sum(output.double().square().sum() for output in as_tuple(op(**arguments)))
            gradients.append(torch.autograd.grad(loss, leaves))
        assert_same_bits(*gradients)


@pytest.mark.parametrize("case", RAISING, ids=lambda case: case.name)
def test_backward_raises_and_names_the_op(case: OpCase) -> None:
    for argument, dtype in itertools.product(case.differentiable, case.dtypes):
        call = target.native(next(iter(case.calls.values()))(dtype))
        call[argument].requires_grad_()
        outputs = [output for output in as_tuple(case.op(**call)) if output.is_floating_point()]
        for output in outputs:
            with pytest.raises(NotImplementedError, match=f"longctx::{case.name}"):
                output.nan_to_num(neginf=0.0).sum().backward(retain_graph=True)
        record(case.name, dtype, direction="backward raises")
        with torch.no_grad():
            assert not any(output.requires_grad for output in as_tuple(case.op(**call)))
