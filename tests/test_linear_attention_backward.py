"""The gradients of linear_attention against finite differences and against autograd through the recurrence."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_same_bits, in_float64, record
from linear_cases import linear
from longctx import reference
from longctx.benchmark.linear_cases import chunked_linear_attention
from longctx.testing import surround_with_nan
from op_case import DTYPES, Call, int32, qkv, randn
from test_linear_attention import DECAYS, relative_error

NAMES = ("q", "k", "v", "log_decay", "initial_state")
# Relative root mean square error against float64. float16: three units of rounding, 2^-11 / sqrt(3) each; all else that
# happens to it is nearly float32.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 8e-4, torch.bfloat16: 8e-3}

Gradients = dict[str, Tensor]


def forms(dtype: torch.dtype, length: int = 130, **sizes: Any) -> dict[str, Call]:
    """A call of every form of the op, with decays below 0, where a gradient exists on both sides."""
    sizes = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 40, "head_dim_v": 24} | sizes
    heads = sizes["num_q_heads"]

    def call(decay: str | None, *, seqlen_q: int = length, batch: int = 2, num_states: int = 2, **options: Any) -> Call:
        shape = (batch, heads, length) if decay == "per token" else (heads,)
        lengths = {"seqlen_q": seqlen_q, "seqlen_k": length, "batch": batch}
        result = linear(
            dtype, decay=shape, num_states=num_states, normalize=options.get("normalize", False), **lengths, **sizes
        )
        result["log_decay"] = None if decay is None else -randn(*shape, seed=5).abs() - 0.01
        return result | {"scale": 0.7} | options

    normalized = {"normalize": True, "eps": 0.1}
    packed = {
        "batch": 1,
        "num_states": 6,
        "cu_seqlens": int32(0, 0, length // 8, length // 2, length // 2, length - 3, length - 3),
    }
    return {
        "causal": call("per head"),
        "causal without decay": call(None),
        "causal per token": call("per token"),
        "causal normalized": call("per token", **normalized),
        "causal segments": call("per token", num_segments=2),
        "wide": call("per token", wide_out=True),
        "reverse": call("per head", reverse=True),
        "reverse per token": call("per token", reverse=True),
        "reverse normalized": call("per head", reverse=True, **normalized),
        "unmasked": call("per head", causal=False),
        "unmasked without decay": call(None, causal=False),
        "unmasked per token": call("per token", causal=False),
        "unmasked normalized": call("per token", causal=False, **normalized),
        "more rows": call("per head", causal=False, seqlen_q=length + 9),
        "fewer rows": call("per head", causal=False, seqlen_q=length // 2),
        "fewer rows without decay": call(None, causal=False, seqlen_q=length // 2),
        "packed": call("per token", **packed),
        "packed reverse": call("per head", reverse=True, **packed),
        "packed unmasked": call("per token", causal=False, **packed),
        "packed normalized": call("per head", **packed, **normalized),
    }


FORMS = tuple(forms(torch.float32))


def gradients(function: Callable[..., Any], call: Call, *weights: Tensor) -> Gradients:
    """Of the sum of both outputs, weighted; the leaves keep their strides."""
    leaves = {name: call[name].detach().requires_grad_() for name in NAMES if call.get(name) is not None}
    outputs = function(**call | leaves)
    loss = sum((output * w.to(output.dtype)).sum() for output, w in zip(outputs, weights, strict=True))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def weights_of(call: Call) -> tuple[Tensor, Tensor]:
    """dout and the gradient of the final state."""
    q, v, normalize = call["q"], call["v"], call.get("normalize", False)
    num_seqs = len(call["cu_seqlens"]) - 1 if "cu_seqlens" in call else q.shape[0]
    dout = randn(*q.shape[:3], v.shape[3], dtype=q.dtype, seed=8)
    return dout, randn(num_seqs, q.shape[1], q.shape[3], v.shape[3] + normalize, seed=9)


def exact_gradients(call: Call) -> Gradients:
    return gradients(reference.linear_attention, in_float64(call), *weights_of(call))


@functools.cache
def exact_gradients_of(form: str, dtype: torch.dtype) -> Gradients:
    return exact_gradients(forms(dtype)[form])


def assert_close(call: Call, actual: Gradients, exact: Gradients) -> None:
    """A decay's gradient is a difference, often a small one, of sums of q . dq and k . dk, and has their errors.

    In a chunk it sums up to 64 of them, those of a decay per head on average half as many: random errors grow by the
    root of that.
    """
    for name, gradient in actual.items():
        assert gradient.shape == exact[name].shape
        scale = exact[name].norm()
        if name == "log_decay":
            scale = scale + 4 * (call["q"].double() * exact["q"]).sum(3).norm()
        error = (gradient.double() - exact[name]).norm()
        assert error <= tolerance_of(call, name, gradient) * scale, f"{name}: {error / scale:.1e}"


def tolerance_of(call: Call, name: str, gradient: Tensor) -> float:
    """Nothing behind a decay's gradient is rounded to 16 bits. Decays and it may be float32 beside float64."""
    dtype = call["q"].dtype
    if name == "log_decay":
        dtype = torch.promote_types(dtype, torch.float32)
    return max(TOLERANCE[dtype], torch.finfo(gradient.dtype).eps)


def check(call: Call) -> None:
    actual = gradients(longctx.linear_attention, call, *weights_of(call))
    assert_close(call, actual, exact_gradients(call))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    """Finite differences of both outputs, in float64."""
    call = in_float64(forms(torch.float64, length=67, head_dim=3, head_dim_v=2)[form])
    names = [name for name in NAMES if call[name] is not None]

    def function(*inputs: Tensor) -> Any:
        return longctx.linear_attention(**call | dict(zip(names, inputs, strict=True)))

    assert torch.autograd.gradcheck(function, [call[name].requires_grad_() for name in names], fast_mode=True)
    call = in_float64(forms(torch.float64, length=5, head_dim=3, head_dim_v=2)[form])
    assert torch.autograd.gradcheck(function, [call[name].requires_grad_() for name in names])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(isa: str, form: str, dtype: torch.dtype) -> None:
    call = forms(dtype)[form]
    actual = gradients(longctx.linear_attention, call, *weights_of(call))
    for name, gradient in actual.items():
        assert gradient.dtype == call[name].dtype
    assert_close(call, actual, exact_gradients_of(form, dtype))
    record("linear_attention", dtype, call["q"].shape[3], direction="backward")


def test_gradients_have_gradients() -> None:
    for form in ("causal", "reverse", "unmasked normalized"):
        call = in_float64(forms(torch.float64, length=67, head_dim=3, head_dim_v=2)[form])
        names = ("q", "k", "v", "initial_state")

        def function(*inputs: Tensor, call: Call = call, names: tuple[str, ...] = names) -> Any:
            return longctx.linear_attention(**call | dict(zip(names, inputs, strict=True)))

        assert torch.autograd.gradgradcheck(function, [call[name].requires_grad_() for name in names], fast_mode=True)


def test_gradients_of_a_decays_gradient_raise() -> None:
    call = linear(torch.float32, decay=(4,), seqlen_q=75, seqlen_k=75)
    log_decay = call["log_decay"].requires_grad_()
    out, _ = longctx.linear_attention(**call)
    (gradient,) = torch.autograd.grad(out.sum(), log_decay, create_graph=True)
    with pytest.raises(NotImplementedError, match="longctx::linear_attention_states has no backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_for(name: str) -> None:
    """One gradient alone is the same as among all."""
    call = forms(torch.float32)["causal per token"]
    dout, dfinal = weights_of(call)
    every = gradients(longctx.linear_attention, call, dout, dfinal)
    out, state = longctx.linear_attention(**call | {name: call[name].requires_grad_()})
    (alone,) = torch.autograd.grad((out, state), call[name], (dout, dfinal))
    torch.testing.assert_close(alone, every[name])


@pytest.mark.parametrize("form", ["causal per token", "reverse", "unmasked", "causal normalized"])
@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone(form: str, output: int) -> None:
    call = forms(torch.float32)[form]
    weights = [w * (i == output) for i, w in enumerate(weights_of(call))]
    expected = gradients(longctx.linear_attention, call, *weights)
    leaves = [call[name].requires_grad_() for name in NAMES]
    result = longctx.linear_attention(**call)[output]
    alone = torch.autograd.grad(result, leaves, weights[output], allow_unused=True)
    for name, gradient in zip(NAMES, alone, strict=True):
        assert relative_error(gradient, expected[name]) <= 1e-4


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_scales(scale: float) -> None:
    check(forms(torch.float32, length=20)["causal per token"] | {"scale": scale})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("per_token", [False, True])
def test_lengths(dtype: torch.dtype, length: int, per_token: bool) -> None:
    shape = (2, 4, length) if per_token else (4,)
    call = linear(dtype, decay=shape, num_states=2, seqlen_q=length, seqlen_k=length, head_dim_v=24)
    call["log_decay"] = -randn(*shape, seed=5).abs()
    if length:
        check(call)
    else:
        actual = gradients(longctx.linear_attention, call, *weights_of(call))
        assert_same_bits(actual["initial_state"], weights_of(call)[1].to(call["initial_state"].dtype))
        assert not any(gradient.any() for name, gradient in actual.items() if name != "initial_state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (7, 40), (128, 128), (300, 129)])
def test_head_dims(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> None:
    sizes = {"seqlen_q": 100, "seqlen_k": 100, "head_dim": head_dim, "head_dim_v": head_dim_v, "num_kv_heads": 4}
    call = linear(dtype, decay=(4,), num_states=2, **sizes)
    check(call | {"log_decay": torch.tensor([-0.1, -0.5, -0.01, -1.0])})
    record("linear_attention", dtype, head_dim, direction="backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("causal", [True, False])
def test_no_decay_overflows(dtype: torch.dtype, decay: float, per_token: bool, causal: bool) -> None:
    call = qkv(dtype, seqlen_q=150, seqlen_k=150, head_dim=32) | {"causal": causal}
    call["log_decay"] = torch.full((2, 4, 150) if per_token else (4,), -decay)
    actual = gradients(longctx.linear_attention, call, *weights_of(call))
    exact = exact_gradients(call)
    assert all(gradient.isfinite().all() for gradient in actual.values())
    if decay == float("inf"):
        assert not actual["log_decay"].any()
    assert_close(call, actual, exact)


@pytest.mark.parametrize("per_token", [False, True])
def test_decays_that_count_as_zero_have_no_gradient(per_token: bool) -> None:
    call = qkv(torch.float32, seqlen_q=100, seqlen_k=100)
    shape = (2, 4, 100) if per_token else (4,)
    weights = weights_of(call)
    zero, positive = (
        gradients(longctx.linear_attention, call | {"log_decay": torch.full(shape, value)}, *weights)
        for value in (0.0, 1.0)
    )
    for name in "qkv":
        assert_same_bits(positive[name], zero[name])
    assert zero["log_decay"].any()
    assert not positive["log_decay"].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [1e-6, 1e-3, 0.05, 2.0])
def test_decay_over_a_long_sequence(dtype: torch.dtype, decay: float) -> None:
    """Against the whole matrix of weights in float64: the error does not grow with what lies between two tokens."""
    length = 3000
    call = qkv(dtype, batch=1, num_q_heads=1, num_kv_heads=1, seqlen_q=length, seqlen_k=length, head_dim=8)
    call["log_decay"] = -decay * randn(1, 1, length, seed=5).abs()
    weights = weights_of(call)
    actual = gradients(longctx.linear_attention, call, *weights)

    def dense(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        sums = log_decay.cumsum(2)
        pairs = torch.exp((sums[..., None] - sums[:, :, None]).tril()).tril()
        last = torch.exp(sums[:, :, -1:] - sums)[..., None]
        return (pairs * (q @ k.transpose(2, 3))) @ v, (last * k).transpose(2, 3) @ v

    exact = gradients(dense, in_float64(call), *weights)
    for name, gradient in actual.items():
        assert relative_error(gradient, exact[name]) <= tolerance_of(call, name, gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_chunks_in_pytorch(isa: str, dtype: torch.dtype) -> None:
    call = qkv(dtype, num_kv_heads=4, seqlen_q=512, seqlen_k=512, head_dim=64)
    call["log_decay"] = torch.tensor([-0.5, -0.1, -0.02, -0.004])
    weights = weights_of(call)

    def peer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_linear_attention(q, k, v, log_decay)()

    ours, theirs = (gradients(function, call, *weights) for function in (longctx.linear_attention, peer))
    exact = gradients(peer, in_float64(call), *weights)
    for name, gradient in ours.items():
        assert relative_error(gradient, exact[name]) <= 2 * relative_error(theirs[name], exact[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["causal per token", "reverse", "unmasked", "packed"])
def test_repeats_bitwise(form: str, dtype: torch.dtype) -> None:
    call = forms(dtype)[form]
    first, second = (gradients(longctx.linear_attention, call, *weights_of(call)) for _ in range(2))
    assert_same_bits(tuple(first.values()), tuple(second.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"causal": False}], ids=str)
def test_packed_equals_one_by_one(dtype: torch.dtype, options: Call) -> None:
    offsets = [0, 0, 17, 81, 81, 230, 290]
    sizes = {"batch": 1, "seqlen_q": 300, "seqlen_k": 300, "head_dim": 32}
    call = linear(dtype, decay=(1, 4, 300), num_states=6, **sizes) | {"num_segments": 1} | options
    packed = call | {"cu_seqlens": int32(*offsets)}
    dout, dfinal = weights_of(packed)
    together = gradients(longctx.linear_attention, packed, dout, dfinal)
    for s, (begin, end) in enumerate(itertools.pairwise(offsets)):
        rows = slice(begin, end)
        alone = call | {name: call[name][:, :, rows] for name in ("q", "k", "v", "log_decay")}
        alone |= {"initial_state": call["initial_state"][s : s + 1]}
        expected = gradients(longctx.linear_attention, alone, dout[:, :, rows], dfinal[s : s + 1])
        assert_same_bits(together["initial_state"][s : s + 1], expected["initial_state"])
        for name in "qkv":
            assert_same_bits(together[name][:, :, rows], expected[name])
        torch.testing.assert_close(together["log_decay"][:, :, rows], expected["log_decay"])
    for name in ("q", "k", "v", "log_decay"):
        assert not together[name][:, :, 290:].any()


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("form", ["causal", "reverse per token", "unmasked", "causal normalized"])
def test_strided_inputs_amid_nan(form: str, dtype: torch.dtype, layout: Any) -> None:
    call = forms(dtype)[form]
    views = {name: surround_with_nan(call[name], layout=layout) for name in "qkv"}
    dout, dfinal = weights_of(call)
    strided = gradients(longctx.linear_attention, call | views, surround_with_nan(dout, layout=layout), dfinal)
    plain = gradients(longctx.linear_attention, call, dout, dfinal)
    assert_same_bits(tuple(strided.values()), tuple(plain.values()))


def test_gradient_of_a_sum() -> None:
    """dout is one number expanded over all rows: its last dim is not contiguous."""
    call = forms(torch.float32)["causal"]
    dout, dfinal = weights_of(call)
    exact = gradients(reference.linear_attention, in_float64(call), torch.ones_like(dout), torch.zeros_like(dfinal))
    leaves = [call[name].requires_grad_() for name in "qkv"]
    longctx.linear_attention(**call)[0].sum().backward()
    for leaf, name in zip(leaves, "qkv", strict=True):
        assert leaf.grad is not None
        assert relative_error(leaf.grad, exact[name]) <= TOLERANCE[torch.float32]


def peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


@pytest.mark.parametrize("trained_decay", [False, True])
def test_memory(trained_decay: bool) -> None:
    """Beyond inputs and gradients: no more than the states at the ends of chunks, once."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    sizes = {"batch": 1, "num_q_heads": 8, "num_kv_heads": 8, "seqlen_q": 16384, "seqlen_k": 16384, "head_dim": 128}
    call = qkv(torch.bfloat16, **sizes) | {"log_decay": -torch.rand(8)}
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v") + ("log_decay",) * trained_decay]
    dout = torch.ones_like(call["v"])
    out, _ = longctx.linear_attention(**call)
    torch.autograd.grad(out, leaves, dout, retain_graph=True)  # what the allocator keeps for itself
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    results = torch.autograd.grad(out, leaves, dout)
    extra = peak_resident_bytes() - before - sum(x.nbytes for x in results)
    tokens_and_heads = 8 * 16384
    assert extra <= tokens_and_heads * 128 * 128 * 4 / 64 + 2**23
