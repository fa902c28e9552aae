"""The parts of longctx.linear's layers: norm, gated unit, positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from checks import assert_same_bits
from longctx.linear import LRPE, SGLU, SimpleRMSNorm
from op_case import DTYPES, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simple_rms_norm(dtype: torch.dtype) -> None:
    x = randn(3, 5, 40, dtype=dtype, seed=0) * 30
    out, wide = SimpleRMSNorm()(x), x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype))
    # Squares of float16 that overflow float16.
    torch.testing.assert_close(SimpleRMSNorm()(torch.full((4,), 1000.0, dtype=dtype)), torch.ones(4, dtype=dtype))
    assert not SimpleRMSNorm()(torch.zeros(4, dtype=dtype)).any()
    assert not list(SimpleRMSNorm().parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_sglu(bias: bool) -> None:
    torch.manual_seed(0)
    glu, x = SGLU(16, 40, bias=bias).double(), randn(2, 3, 16, dtype=torch.float64, seed=1)

    def affine(layer: nn.Linear, x: Tensor) -> Tensor:
        return x @ layer.weight.T + (layer.bias if bias else 0)

    torch.testing.assert_close(glu(x), affine(glu.down_proj, affine(glu.gate_proj, x) * affine(glu.up_proj, x)))
    assert torch.autograd.gradcheck(glu, (x.requires_grad_(),))


def test_lrpe_by_hand() -> None:
    lrpe, x = LRPE(num_heads=2, head_dim=3), randn(1, 2, 4, 3, seed=0)
    out = lrpe(x, torch.arange(5, 9))
    for head in range(2):
        for t in range(4):
            for i in range(3):
                angle = 10000.0 ** (-2 * (3 * head + i) / 6) * (5 + t)
                pair = (out[0, head, t, i].item(), out[0, head, t, 3 + i].item())
                value = x[0, head, t, i].item()
                assert pair == pytest.approx((value * math.cos(angle), value * math.sin(angle)), abs=1e-5)


@pytest.mark.parametrize("base", [0, 2**20])
def test_lrpe_knows_differences_alone(base: int) -> None:
    """Query heads share the angles of their key head; a million tokens on, scores are the same."""
    lrpe = LRPE(num_heads=2, head_dim=16)
    q, k = randn(1, 6, 9, 16, seed=0), randn(1, 2, 9, 16, seed=1)
    positions = torch.arange(9)
    difference = (positions[:, None] - positions).double()
    expected = sum_of_cosines(q, k.repeat_interleave(3, dim=1), lrpe.theta.repeat_interleave(3, dim=0), difference)
    rotated_q, rotated_k = lrpe(q, positions + base), lrpe(k, positions + base)
    scores = rotated_q @ rotated_k.repeat_interleave(3, dim=1).transpose(2, 3)
    torch.testing.assert_close(scores, expected.float(), rtol=0, atol=1e-5)


def sum_of_cosines(q: Tensor, k: Tensor, theta: Tensor, difference: Tensor) -> Tensor:
    cosines = torch.cos(theta.double()[:, :, None] * difference[..., None])  # [heads, seqlen, seqlen, head_dim]
    return torch.einsum("bhsd,bhtd,hstd->bhst", q.double(), k.double(), cosines)


def test_lrpe_positions_of_each_sequence() -> None:
    lrpe, x = LRPE(num_heads=2, head_dim=4), randn(2, 2, 3, 4, seed=0)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    expected = torch.cat([lrpe(x[b : b + 1], positions[b]) for b in range(2)])
    assert_same_bits(lrpe(x, positions), expected)


def test_lrpe_gradients() -> None:
    lrpe, x = LRPE(num_heads=2, head_dim=3).double(), randn(1, 4, 5, 3, dtype=torch.float64, seed=0)
    theta = lrpe.theta.detach().clone().requires_grad_()
    call = lambda x, theta: torch.func.functional_call(lrpe, {"theta": theta}, (x, torch.arange(5)))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), theta))


@pytest.mark.parametrize(
    ("shape", "positions", "message"),
    [
        ((2, 3, 5, 4), torch.arange(5), "`x` must have shape"),
        ((2, 2, 5, 8), torch.arange(5), "`x` must have shape"),
        ((2, 5, 4), torch.arange(5), "`x` must have shape"),
        ((2, 2, 5, 4), torch.arange(4), "`positions` must be integers of shape"),
        ((2, 2, 5, 4), torch.zeros(3, 5, dtype=torch.int64), "`positions` must be integers of shape"),
        ((2, 2, 5, 4), torch.zeros(5), "`positions` must be integers of shape"),
    ],
)
def test_lrpe_bad_arguments(shape: tuple[int, ...], positions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"longctx::LRPE: {message}"):
        LRPE(num_heads=2, head_dim=4)(torch.zeros(shape), positions)
