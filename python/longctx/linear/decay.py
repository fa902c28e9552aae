"""Decays of linear attention, one function for each published convention: they do not agree with each other.

Each returns `log_decay` of `longctx.linear_attention`, float32 `[num_heads]`, `<= 0`. A checkpoint works only with
the decays it was trained with. Heads and layers count from 0: head `h` of `H = num_heads`, layer `l` of
`L = num_layers`. Values are computed in double and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def minimax_log_decay(num_heads: int, layer_idx: int, num_layers: int) -> Tensor:
    """MiniMax as in transformers: `-2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)`.

    Head 0 forgets fastest, the last layer hardly at all. The same as `transnormer_code_log_decay` to 1e-5 where
    `num_heads` is a power of two, and only there.

    Source: `MiniMaxLightningAttention.get_slope_rate` in transformers; MiniMax-01 (arXiv 2501.08313).

    Example:
        >>> from longctx.linear import minimax_log_decay
        >>> minimax_log_decay(num_heads=4, layer_idx=0, num_layers=8)
        tensor([-0.2500, -0.0625, -0.0156, -0.0039])
    """
    _check("minimax_log_decay", num_heads, layer_idx, num_layers)
    factor = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    return _float32([-slope * factor for slope in _geometric_slopes(num_heads)])


def transnormer_code_log_decay(num_heads: int, layer_idx: int, num_layers: int) -> Tensor:
    """TransNormerLLM as released, and MiniMax-01's own code: `-slope_h * (1 - l / (L - 1) + 1e-5)`.

    `slope_h` are the slopes of ALiBi: `2^(-8 (h + 1) / H)` where `H` is a power of two, else those of the next
    lower power `P`, followed by every other one of `2 P`. A model of one layer, which the code cannot build,
    counts as `l / (L - 1) = 0`.

    Source: `_build_slope_tensor` of OpenNLPLab/TransNormerLLM and lightning-attention (arXiv 2401.04658); slopes:
    Press et al., "Train Short, Test Long" (arXiv 2108.12409).

    Example:
        >>> from longctx.linear import transnormer_code_log_decay
        >>> transnormer_code_log_decay(num_heads=3, layer_idx=0, num_layers=8)
        tensor([-0.0625, -0.0039, -0.2500])
    """
    _check("transnormer_code_log_decay", num_heads, layer_idx, num_layers)
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric_slopes(power) + _geometric_slopes(2 * power)[::2][: num_heads - power]
    factor = 1 - layer_idx / max(num_layers - 1, 1) + 1e-5
    return _float32([-slope * factor for slope in slopes])


def transnormer_paper_log_decay(num_heads: int, layer_idx: int, num_layers: int) -> Tensor:
    """TransNormerLLM as in the paper: `-(8 h / H) * (1 - l / L)`. The released code does not use it.

    Head 0 forgets nothing, the last head fastest: the order of heads is the reverse of that of the code.

    Source: Qin et al., "TransNormerLLM" (arXiv 2307.14995); `chunk_lightning_attn` of flash-linear-attention.

    Example:
        >>> from longctx.linear import transnormer_paper_log_decay
        >>> transnormer_paper_log_decay(num_heads=4, layer_idx=2, num_layers=8)
        tensor([ 0.0000, -1.5000, -3.0000, -4.5000])
    """
    _check("transnormer_paper_log_decay", num_heads, layer_idx, num_layers)
    step = 8 / num_heads * (1 - layer_idx / num_layers)
    return _float32([0.0, *(-step * head for head in range(1, num_heads))])


def retnet_log_decay(num_heads: int) -> Tensor:
    """RetNet: `log(1 - 2^(-5 - h))`, the same in every layer.

    Source: Sun et al., "Retentive Network" (arXiv 2307.08621).

    Example:
        >>> from longctx.linear import retnet_log_decay
        >>> retnet_log_decay(num_heads=4).exp()
        tensor([0.9688, 0.9844, 0.9922, 0.9961])
    """
    _check("retnet_log_decay", num_heads, 0, 1)
    return _float32([math.log1p(-(2.0 ** (-5 - head))) for head in range(num_heads)])


def _geometric_slopes(num_heads: int) -> list[float]:
    return [2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]


def _float32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _check(function: str, num_heads: int, layer_idx: int, num_layers: int) -> None:
    if num_heads < 1:
        raise ValueError(f"longctx::{function}: `num_heads` must be at least 1; got {num_heads}")
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"longctx::{function}: `layer_idx` must be in [0, num_layers) = [0, {num_layers}); got {layer_idx}"
        )
