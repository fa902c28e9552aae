"""Sparse prefill: published methods as policies, one file each."""

from __future__ import annotations

from longctx.prefill.dense import Dense
from longctx.prefill.perlayer import PerLayer
from longctx.prefill.policy import AttentionContext, Pattern, Policy, get_policy

__all__ = ["AttentionContext", "Dense", "Pattern", "PerLayer", "Policy", "get_policy"]
