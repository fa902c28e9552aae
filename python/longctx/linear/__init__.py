"""Layers of linear attention models: decays, positions, norm, gated units, and attention between its projections.

All of them train: they are differentiable wherever `longctx.linear_attention` is. Decoding in place is not.
"""

from __future__ import annotations

from longctx.linear.block import TransNormerBlock
from longctx.linear.decay import (
    minimax_log_decay,
    retnet_log_decay,
    transnormer_code_log_decay,
    transnormer_paper_log_decay,
)
from longctx.linear.glu import SGLU
from longctx.linear.lightning import LightningAttention, LightningState
from longctx.linear.norm import SimpleRMSNorm
from longctx.linear.rotary import LRPE

__all__ = [
    "LRPE",
    "SGLU",
    "LightningAttention",
    "LightningState",
    "SimpleRMSNorm",
    "TransNormerBlock",
    "minimax_log_decay",
    "retnet_log_decay",
    "transnormer_code_log_decay",
    "transnormer_paper_log_decay",
]
