"""Layers of linear attention models, one concept a file."""

from __future__ import annotations

from longctx.linear.decay import (
    minimax_log_decay,
    retnet_log_decay,
    transnormer_code_log_decay,
    transnormer_paper_log_decay,
)
from longctx.linear.glu import SGLU
from longctx.linear.norm import SimpleRMSNorm
from longctx.linear.rotary import LRPE

__all__ = [
    "LRPE",
    "SGLU",
    "SimpleRMSNorm",
    "minimax_log_decay",
    "retnet_log_decay",
    "transnormer_code_log_decay",
    "transnormer_paper_log_decay",
]
