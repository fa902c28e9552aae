"""The measured cases of linear attention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import longctx
from longctx import reference
from longctx.benchmark.case import BF16, FP32, Case, Contenders, partial, qkv


def chunked_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 128
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Linear attention by matmuls, `chunk` tokens at a time: the best of PyTorch on a CPU (measured for 64 to 256).

    What depends on the decays alone is made before.
    """
    position = torch.arange(chunk, dtype=torch.float64, device=q.device)
    decay = log_decay.double()[:, None]
    distance = position[:, None] - position
    pairs = torch.exp(decay[..., None] * distance.clamp(min=0.0)).masked_fill(distance < 0, 0.0).to(q.dtype)
    rows = torch.exp(decay * (position + 1)).to(q.dtype)[..., None]
    keys = torch.exp(decay * (chunk - 1 - position)).to(q.dtype)[..., None]
    carry = torch.exp(decay * chunk).float()[..., None]

    def run() -> tuple[Tensor, Tensor]:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], device=q.device)
        out = []
        for q_rows, k_rows, v_rows in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
            within = ((q_rows @ k_rows.transpose(2, 3)) * pairs) @ v_rows
            out.append(within + (q_rows * rows) @ state.to(q.dtype))
            state = carry * state + ((k_rows * keys).transpose(2, 3) @ v_rows).float()
        return torch.cat(out, dim=2), state

    return run


def _linear(length: int, dtype: torch.dtype) -> Contenders:
    q, k, v = qkv(length, dtype, 8, 8, 128)
    k = 0.1 * 128**-0.5 * k  # outputs near 1: they are compared by absolute error
    log_decay = -(2.0 ** -torch.arange(1.0, 9.0))
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention(q, k, v, log_decay),
        "torch chunks": chunked_linear_attention(q, k, v, log_decay),
    }
    twin = functools.partial(reference.linear_attention, q, k, v, log_decay)
    return Contenders(run, 8.0 * length * 128 * (2 * 64 + 4 * 128), 4.0 * q.nbytes, exact=twin)


def _linear_gradients(length: int, dtype: torch.dtype, *, trained_decay: bool = False) -> Contenders:
    """Forward and backward: under a fixed decay beside PyTorch, under a trained one beside our own fixed one."""
    q, k, v = qkv(length, dtype, 8, 8, 128)
    k = 0.1 * 128**-0.5 * k
    inputs = [x.requires_grad_() for x in (q, k, v)]
    log_decay = -(2.0 ** -torch.arange(1.0, 9.0))
    dout = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(forward: Callable[..., tuple[Tensor, Tensor]], *more: Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():  # contenders are timed without
                return torch.autograd.grad(forward()[0], [*inputs, *more], dout)

        return run

    fixed = gradients(functools.partial(longctx.linear_attention, q, k, v, log_decay))
    trained = log_decay.clone().requires_grad_()
    run = (
        {
            "longctx": gradients(functools.partial(longctx.linear_attention, q, k, v, trained), trained),
            "a fixed decay": fixed,
        }
        if trained_decay
        else {"longctx": fixed, "torch chunks": gradients(chunked_linear_attention(q, k, v, log_decay))}
    )
    twin = gradients(functools.partial(reference.linear_attention, q, k, v, log_decay))
    return Contenders(run, 4 * 8.0 * length * 128 * (2 * 64 + 4 * 128), 4 * 4.0 * q.nbytes, exact=twin)


def _linear_beside_sdpa(length: int, dtype: torch.dtype) -> Contenders:
    """Short lengths: where linear attention overtakes the quadratic one."""
    contenders = _linear(length, dtype)
    q, k, v = qkv(length, dtype, 8, 8, 128)
    sdpa = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    return replace(contenders, run={"longctx": contenders.run["longctx"], "sdpa": sdpa})


def _linear_beside_itself(length: int, dtype: torch.dtype, *, short: int) -> Contenders:
    """The same tokens in calls of `short`: the speed-up is tokens/s at `length` over tokens/s at `short`."""
    q, k, v = qkv(length, dtype, 8, 8, 128)
    k.mul_(0.1 * 128**-0.5)
    log_decay = -(2.0 ** -torch.arange(1.0, 9.0))
    parts = list(zip(*(x.split(short, dim=2) for x in (q, k, v)), strict=True))

    def short_calls() -> None:
        for q_part, k_part, v_part in parts:
            longctx.linear_attention(q_part, k_part, v_part, log_decay)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention(q, k, v, log_decay),
        f"itself, {short} tokens": short_calls,
    }
    twin = functools.partial(reference.linear_attention, q, k, v, log_decay)
    return Contenders(run, 8.0 * length * 128 * (2 * 64 + 4 * 128), 4.0 * q.nbytes, exact=twin)


def _linear_states(length: int, dtype: torch.dtype) -> Contenders:
    _, k, v = qkv(length, dtype, 8, 8, 128)

    def torch_states() -> Tensor:
        chunks = k.unflatten(2, (-1, 64)).transpose(3, 4) @ v.unflatten(2, (-1, 64))
        return torch.cumsum(chunks.float(), dim=2)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention_states(k, v),
        "torch": torch_states,
    }
    twin = functools.partial(reference.linear_attention_states, k, v)
    return Contenders(run, 8.0 * length * 2 * 128 * 128, 2.0 * k.nbytes + length / 64 * 8 * 65536, exact=twin)


def _linear_decode(length: int, dtype: torch.dtype) -> Contenders:
    """One token of one sequence with 64 heads; a state has no length."""
    q, k, v = qkv(1, dtype, 64, 64, 128)
    log_decay = torch.linspace(-1.0, 0.0, 64)
    state, torch_state = torch.zeros(2, 1, 64, 128, 128).unbind(0)
    decay = log_decay.exp()[:, None, None]

    def torch_decode() -> Tensor:
        torch_state.mul_(decay).add_(k.float().transpose(2, 3) @ v.float())
        return (q.float() @ torch_state).to(dtype)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention_decode(q, k, v, log_decay, state),
        "torch": torch_decode,
    }
    return Contenders(run, 64 * 5.0 * 128 * 128, 2.0 * state.nbytes)


def _minimax(length: int, dtype: torch.dtype) -> Contenders:
    from longctx.benchmark.minimax import contenders

    return contenders(length, dtype)


CASES = [
    Case("8 heads, D=128", "linear_attention", 16384, BF16, _linear, {"torch chunks": (6.0, 14.0)}),
    Case("8 heads, D=128", "linear_attention", 16384, FP32, _linear, {"torch chunks": (2.5, 4.5)}),
    # The crossover with SDPA: at most 1024 tokens, the goal is 400.
    Case("8 heads, D=128", "linear_attention", 256, BF16, _linear_beside_sdpa),
    Case("8 heads, D=128", "linear_attention", 400, BF16, _linear_beside_sdpa, {"sdpa": (0.0, 1.0)}),
    Case("8 heads, D=128", "linear_attention", 512, BF16, _linear_beside_sdpa),
    Case("8 heads, D=128", "linear_attention", 1024, BF16, _linear_beside_sdpa, {"sdpa": (1.0, 1.0)}),
    Case(
        "8 heads, D=128, speed kept at length",
        "linear_attention",
        262144,
        BF16,
        partial(_linear_beside_itself, short=4096),
        {"itself, 4096 tokens": (0.9, 1.0)},
    ),
    Case(
        "forward + backward, 8 heads, D=128",
        "linear_attention",
        16384,
        BF16,
        _linear_gradients,
        {"torch chunks": (5.0, 12.0)},
    ),
    Case("forward + backward, 8 heads, D=128", "linear_attention", 16384, FP32, _linear_gradients),
    Case(
        "forward + backward, 8 heads, D=128, decays trained",
        "linear_attention",
        16384,
        BF16,
        partial(_linear_gradients, trained_decay=True),
    ),
    Case("8 heads, D=128", "linear_attention_states", 16384, BF16, _linear_states),
    Case("64 heads, D=128", "linear_attention_decode", 1, BF16, _linear_decode, {"torch": (3.0, 8.0)}),
    Case("64 heads, D=128", "linear_attention_decode", 1, FP32, _linear_decode, {"torch": (3.0, 8.0)}),
]
if importlib.util.find_spec("transformers") is not None:
    goal = {"transformers": (4.0, 10.0)}
    name = "MiniMax lightning layer without projections, 16 heads, D=128"
    CASES += [Case(name, "linear_attention", 8192, dtype, _minimax, goal) for dtype in (BF16, FP32)]
