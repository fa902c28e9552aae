"""Linear attention on a GPU: the shapes of flash-linear-attention's own benchmark, and decode on a pool of states.

Contenders are checked at full length: some rows of every output and gradient against their float32 formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark import peers
from longctx.benchmark.gpu_work import CHECKED_ROWS, GpuCase, Inputs, Run, Work, gpu_case, randn
from longctx.benchmark.linear_cases import chunked_linear_attention
from longctx.ops import LINEAR_CHUNK_SIZE

# Relative root mean square error; peers may round more, but not compute something else.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-4}
PEER_TOLERANCE = 0.1


def linear_inputs(length: int, device: str, *, batch: int, heads: int, dim: int, dtype: torch.dtype) -> Inputs:
    """q, k, v and dout `[batch, heads, length, dim]` that lie in memory as `[batch, length, heads, dim]`."""
    tensors = (randn(batch, length, heads, dim, device=device, seed=seed, dtype=dtype) for seed in range(4))
    q, k, v, dout = (x.transpose(1, 2) for x in tensors)
    log_decay = -0.5 * 2e-3 ** torch.linspace(0.0, 1.0, heads, device=device)  # half-lives of 1 to 700 tokens
    return {"q": q, "k": k * dim**-0.5, "v": v, "dout": dout, "log_decay": log_decay}


def exact_rows(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rows: Tensor) -> Tensor:
    """Causal linear attention of some rows by its formula in float32: [batch, heads, len(rows), dim]."""
    out = torch.empty(*q.shape[:2], len(rows), v.shape[3], device=q.device)
    distance = rows[:, None] - torch.arange(k.shape[2], device=q.device)
    for head in range(q.shape[1]):  # one at a time: float32 copies of all keys would not fit beside the inputs
        weights = torch.exp(log_decay[head] * distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
        scores = q[:, head, rows].float() @ k[:, head].float().mT
        out[:, head] = (weights * scores) @ v[:, head].float()
    return out


def exact_gradients(inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of some rows: linear attention with the tensors swapped, of dk and dv from the last token on."""
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    last = q.shape[2] - 1

    def from_the_end(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return exact_rows(a.flip(2), b.flip(2), c.flip(2), inputs["log_decay"], last - rows)

    return exact_rows(dout, v, k, inputs["log_decay"], rows), from_the_end(v, dout, q), from_the_end(k, q, dout)


def row_check(inputs: Inputs) -> Callable[[str, Any], None]:
    """Compares rows of the output, and of dq, dk and dv behind it, with their formulas."""
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    rows = torch.linspace(0, q.shape[2] - 1, min(CHECKED_ROWS, q.shape[2]), device=q.device).long()

    @functools.cache
    def expected(gradients: bool) -> tuple[Tensor, ...]:
        return exact_gradients(inputs, rows) if gradients else (exact_rows(q, k, v, inputs["log_decay"], rows),)

    def check(name: str, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        exact = expected(False) + (expected(True) if len(outputs) > 1 else ())
        for what, actual, wanted in zip(("out", "dq", "dk", "dv"), outputs, exact, strict=False):
            compare(name, what, actual[:, :, rows], wanted)

    return check


def compare(name: str, what: str, actual: Tensor, exact: Tensor) -> None:
    limit = TOLERANCE[actual.dtype] if name.startswith("longctx") else PEER_TOLERANCE
    error = float((actual.float() - exact).norm() / exact.norm())
    if not error <= limit:
        raise ValueError(f"{what} is not close: relative error {error:.1e}, at most {limit:g}")


def ours(inputs: Inputs) -> Tensor:
    return longctx.linear_attention(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"])[0]


def torch_chunks(inputs: Inputs) -> Tensor:
    return chunked_linear_attention(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"])()[0]


def forward_flops(inputs: Inputs) -> float:
    """Of the products with the state and of the pairs inside a chunk that a row sees."""
    batch, heads, length, dim = inputs["q"].shape
    return float(batch * heads * length * dim * (2 * LINEAR_CHUNK_SIZE + 4 * dim))


def forward(length: int, device: str, *, dtype: torch.dtype = torch.bfloat16, **shape: int) -> Work:
    inputs = linear_inputs(length, device, dtype=dtype, **shape)
    contenders: dict[str, Run] = {"longctx": ours, "torch chunks": torch_chunks, **peers.linear(inputs)}
    return Work(inputs, contenders, forward_flops(inputs), 4.0 * inputs["q"].nbytes, row_check(inputs))


def with_gradients(run: Run) -> Run:
    """(out, dq, dk, dv) of a contender that autograd can follow."""

    def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}
            out = run(inputs | leaves)
        return out.detach(), *torch.autograd.grad(out, list(leaves.values()), inputs["dout"])

    return forward_backward


def forward_backward(length: int, device: str, *, dtype: torch.dtype = torch.bfloat16, **shape: int) -> Work:
    """The backward of a fused sweep reads q, k, v and dout twice, once in each direction, but for what it writes."""
    work = forward(length, device, dtype=dtype, **shape)
    contenders = {name: with_gradients(run) for name, run in work.contenders.items()}
    batch, heads, _, dim = work.inputs["q"].shape
    flops = batch * heads * length * dim * (6 * LINEAR_CHUNK_SIZE + 10 * dim)
    return Work(work.inputs, contenders, work.flops + flops, 3.5 * work.bytes, work.check)


def states(length: int, device: str, *, dtype: torch.dtype = torch.bfloat16, **shape: int) -> Work:
    inputs = linear_inputs(length, device, dtype=dtype, **shape)
    batch, heads, _, dim = inputs["q"].shape
    num_states = batch * heads * -(-length // LINEAR_CHUNK_SIZE)
    contenders: dict[str, Run] = {"longctx": lambda i: longctx.linear_attention_states(i["k"], i["v"], i["log_decay"])}
    flops = 2.0 * batch * heads * length * dim * dim
    return Work(inputs, contenders, flops, 2.0 * inputs["k"].nbytes + 4.0 * num_states * dim * dim)


def torch_decode(inputs: Inputs) -> Tensor:
    q, k, v, state = (inputs[name] for name in ("q", "k", "v", "torch_state"))
    state.mul_(inputs["log_decay"].exp()[:, None, None]).add_(k.float().mT @ v.float())
    out: Tensor = q.float() @ state
    return out.to(q.dtype)


def decode(length: int, device: str, *, batch: int, heads: int = 64, dim: int = 128) -> Work:
    """`length` tokens of every sequence, one. The contenders that write in place have a state each."""
    inputs = linear_inputs(length, device, batch=batch, heads=heads, dim=dim, dtype=torch.bfloat16)
    state = randn(batch, heads, dim, dim, device=device, seed=4, dtype=torch.float32)
    inputs |= {"state": state, "torch_state": state.clone(), "other_state": state.clone()}
    q, k, v = (inputs[name].float() for name in ("q", "k", "v"))
    exact = inputs["log_decay"].exp()[:, None, None] * (q @ state) + (q * k).sum(-1, keepdim=True) * v
    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.linear_attention_decode(i["q"], i["k"], i["v"], i["log_decay"], i["state"]),
        "torch": torch_decode,
        **peers.linear_decode(inputs),
    }
    flops = 5.0 * batch * heads * dim * dim
    return Work(inputs, contenders, flops, 2.0 * state.nbytes, lambda name, out: compare(name, "out", out, exact))


def case(title: str, length: int, make: Callable[..., Work] = forward, **options: Any) -> GpuCase:
    return gpu_case(title, "linear_attention", length, make, small=256, **options)


def decode_case(batch: int) -> GpuCase:
    title = f"batch {batch}, 64 heads, D=128"
    return gpu_case(title, "linear_attention_decode", 1, decode, 1, batch=batch)


K = 1024
LARGE, LAUNCH_BOUND = "batch 1, 96 heads, D=128", "batch 8, 8 heads, D=64"
BACKWARD = ", forward and backward"
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    LARGE: (8 * K, {"batch": 1, "heads": 96, "dim": 128}),
    LAUNCH_BOUND: (K, {"batch": 8, "heads": 8, "dim": 64}),
    "batch 2, 16 heads, D=128": (16 * K, {"batch": 2, "heads": 16, "dim": 128}),
    "batch 4, 16 heads, D=128": (2 * K, {"batch": 4, "heads": 16, "dim": 128}),
    "batch 4, 64 heads, D=128": (4 * K, {"batch": 4, "heads": 64, "dim": 128}),
    "batch 8, 32 heads, D=256": (2 * K, {"batch": 8, "heads": 32, "dim": 256}),
}
FORWARD = [case(title, length, **shape) for title, (length, shape) in SHAPES.items()]
FORWARD_BACKWARD = [
    case(title + BACKWARD, length, forward_backward, **shape) for title, (length, shape) in SHAPES.items()
]
HEADLINE: list[GpuCase] = [*FORWARD[:2], *FORWARD_BACKWARD[:2], decode_case(1)]
OTHERS: list[GpuCase] = [
    *FORWARD[2:],
    *FORWARD_BACKWARD[2:],
    case("batch 1, 64 heads, D=128", 128 * K, batch=1, heads=64, dim=128),
    case("batch 1, 32 heads, D=128, fp32", 4 * K, dtype=torch.float32, batch=1, heads=32, dim=128),
    gpu_case(LARGE, "linear_attention_states", 8 * K, states, 256, batch=1, heads=96, dim=128),
    decode_case(16),
    decode_case(64),
]
