"""Different policies in different layers, as most methods keep their first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from longctx.prefill.policy import AttentionContext, Pattern, Policy


@dataclass(frozen=True, kw_only=True)
class PerLayer(Policy):
    """`PerLayer({0: Dense(), 1: Dense()}, default=FlexPrefill())`: `default` serves the layers not listed."""

    name: ClassVar[str] = "perlayer"
    layers: Mapping[int, Policy] = field(kw_only=False)
    default: Policy

    def __post_init__(self) -> None:
        layers = dict(self.layers)
        self._require("layers", all(type(i) is int and i >= 0 for i in layers), "map layer numbers >= 0 to policies")
        policies = [*layers.values(), self.default]
        self._require("layers", all(isinstance(p, Policy) for p in policies), "hold policies, as must `default`")
        object.__setattr__(self, "layers", layers)

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.layers.items(), key=lambda item: item[0])), self.default))

    @property
    def needs(self) -> frozenset[str]:
        policies = [*self.layers.values(), self.default]
        return frozenset({"layer_idx"}).union(*(policy.needs for policy in policies))

    @property
    def changes_logits(self) -> bool:
        return any(policy.changes_logits for policy in [*self.layers.values(), self.default])

    def policy_of(self, layer_idx: int | None) -> Policy:
        """The policy of one layer."""
        if layer_idx is None:
            raise ValueError("longctx::perlayer: `layer_idx` must be given in the context; got None")
        return self.layers.get(layer_idx, self.default)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        return self.policy_of(context.layer_idx).select(q, k, context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        return self.policy_of(context.layer_idx).attend(q, k, v, context)
