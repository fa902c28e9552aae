"""The decays of longctx.linear against the papers' formulas and transformers' MiniMax."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from longctx import linear


def minimax_config(num_heads: int, num_layers: int) -> Any:
    configuration = pytest.importorskip("transformers.models.minimax", reason="transformers is missing")
    return configuration.MiniMaxConfig(
        hidden_size=48,
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
