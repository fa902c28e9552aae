"""Every score: the reference point of all other policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longctx.prefill.cost import Lengths
from longctx.prefill.policy import AttentionContext, Pattern, Policy


@dataclass(frozen=True, kw_only=True)
class Dense(Policy):
    """Attention over everything the predicate of the call shows."""

    name: ClassVar[str] = "dense"

    def least_cost(self, lengths: Lengths) -> float:
        return 1.0

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        return Pattern.of(q, k, context)
