"""Sparse prefill: published methods as policies, one file each."""

from __future__ import annotations

from longctx.prefill.ashape import AShape
from longctx.prefill.blocktopk import BlockTopK
from longctx.prefill.controls import OracleBlocks, RandomBlocks
from longctx.prefill.coverage import coverage
from longctx.prefill.dense import Dense
from longctx.prefill.flexprefill import FlexPrefill
from longctx.prefill.lminfinite import LMInfinite
from longctx.prefill.perlayer import PerLayer
from longctx.prefill.policy import AttentionContext, Pattern, Policy, get_policy
from longctx.prefill.xattention import XAttention

__all__ = [
    "AShape",
    "AttentionContext",
    "BlockTopK",
    "Dense",
    "FlexPrefill",
    "LMInfinite",
    "OracleBlocks",
    "Pattern",
    "PerLayer",
    "Policy",
    "RandomBlocks",
    "XAttention",
    "coverage",
    "get_policy",
]
