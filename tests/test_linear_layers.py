"""The layers of longctx.linear against the papers' formulas, transformers' MiniMax, and each other."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import DTYPES, randn
from checks import assert_same_bits
from longctx import linear
from longctx.linear import LRPE, SGLU, SimpleRMSNorm

HIDDEN = 48


# ---- decays


def minimax_config(num_heads: int, num_layers: int) -> Any:
    configuration = pytest.importorskip("transformers.models.minimax", reason="transformers is missing")
    return configuration.MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=num_heads,
        head_dim=20,
        num_hidden_layers=num_layers,
        layer_types=["linear_attention"] * num_layers,
        block_size=32,
    )


def test_minimax_decay_is_that_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax", reason="transformers is missing")
    for num_heads, num_layers in ((8, 1), (6, 4), (64, 80)):
        config = minimax_config(num_heads, num_layers)
        for layer_idx in {0, num_layers // 2, num_layers - 1}:
            stock = modeling.MiniMaxLightningAttention(config, layer_idx).slope_rate.flatten()
            # The stock slopes are powers taken in float32.
            torch.testing.assert_close(
                linear.minimax_log_decay(num_heads, layer_idx, num_layers), -stock, rtol=1e-5, atol=0
            )


def test_minimax_decay_by_hand() -> None:
    first = linear.minimax_log_decay(8, 0, 24)
    torch.testing.assert_close(first, -(2.0 ** -torch.arange(1.0, 9.0)) * (1 + 1e-5))
    last = linear.minimax_log_decay(8, 23, 24)
    assert (last.abs() < 1e-5).all()
    assert (last < 0).all()


def test_transnormer_code_decay_by_hand() -> None:
    torch.testing.assert_close(
        linear.transnormer_code_log_decay(8, 12, 25), -(2.0 ** -torch.arange(1.0, 9.0)) * (0.5 + 1e-5)
    )
    # Not a power of two: the slopes of 8 heads, then every other one of 16.
    slopes = [2.0 ** -(h + 1) for h in range(8)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    torch.testing.assert_close(linear.transnormer_code_log_decay(12, 3, 7), -torch.tensor(slopes) * (1 - 3 / 6 + 1e-5))
    torch.testing.assert_close(linear.transnormer_code_log_decay(1, 0, 1), torch.tensor([-(2.0**-8) * (1 + 1e-5)]))


def test_minimax_and_transnormer_code_agree_on_powers_of_two_alone() -> None:
    for num_heads, agree in ((8, True), (64, True), (12, False)):
        pair = (linear.minimax_log_decay(num_heads, 5, 8), linear.transnormer_code_log_decay(num_heads, 5, 8))
        assert torch.allclose(*pair, rtol=0, atol=1e-5) == agree


def test_transnormer_paper_decay_by_hand() -> None:
    torch.testing.assert_close(linear.transnormer_paper_log_decay(8, 0, 12), -torch.arange(8.0))
    torch.testing.assert_close(linear.transnormer_paper_log_decay(4, 9, 12), -torch.tensor([0.0, 0.5, 1.0, 1.5]))


def test_retnet_decay_by_hand() -> None:
    torch.testing.assert_close(
        linear.retnet_log_decay(4), torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256]).log(), rtol=1e-5, atol=0
    )
    # Where 1 - 2^(-5 - h) is 1 in float32, the decay is still there.
    assert linear.retnet_log_decay(32)[-1] == pytest.approx(-(2.0**-36), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in linear.__all__ if name.endswith("log_decay")])
def test_every_decay_is_legal(name: str) -> None:
    build = getattr(linear, name)
    for num_heads in (1, 2, 3, 7, 16, 40):
        layers = [()] if name == "retnet_log_decay" else [(0, 1), (0, 9), (8, 9)]
        for layer in layers:
            log_decay = build(num_heads, *layer)
            assert log_decay.dtype == torch.float32
            assert log_decay.shape == (num_heads,)
            assert ((log_decay <= 0) & log_decay.isfinite()).all()
    with pytest.raises(ValueError, match=re.escape(f"longctx::{name}: `num_heads` must be at least 1; got 0")):
        build(0, *layers[0])
    if layers[0]:
        for layer_idx in (-1, 4):
            with pytest.raises(ValueError, match=re.escape("`layer_idx` must be in [0, num_layers) = [0, 4); got")):
                build(8, layer_idx, 4)


# ---- norm, gated unit, positions


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
