"""What each attention layer ran: the proof that a policy was in effect."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class LayerCounts:
    """The tally one attention module keeps while it runs."""

    sparse: Counter[str] = field(default_factory=Counter)  # policy name -> calls
    dense: Counter[str] = field(default_factory=Counter)  # reason -> calls
    density_sum: Tensor | None = None  # over the sparse calls; stays on the device

    def add_sparse(self, policy: str, density: Tensor) -> None:
        self.sparse[policy] += 1
        self.density_sum = density if self.density_sum is None else self.density_sum + density

    def add_dense(self, reason: str) -> None:
        self.dense[reason] += 1


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One attention layer since its policy was applied."""

    name: str  # of the module in the model
    layer_idx: int | None
    policy: str
    sparse_calls: int
    dense_calls: int
    dense_reasons: dict[str, int]
    density: Tensor | None  # mean over the sparse calls, a float32 scalar; reading it may sync

    @property
    def calls(self) -> int:
        return self.sparse_calls + self.dense_calls

    @classmethod
    def of(cls, name: str, layer_idx: int | None, policy: str, counts: LayerCounts) -> LayerStats:
        sparse_calls = counts.sparse.total()
        return cls(
            name=name,
            layer_idx=layer_idx,
            policy=policy,
            sparse_calls=sparse_calls,
            dense_calls=counts.dense.total(),
            dense_reasons=dict(counts.dense),
            density=None if counts.density_sum is None else counts.density_sum / sparse_calls,
        )


@dataclass(frozen=True, eq=False)
class Stats:
    """All attention layers of a model; `print` shows the table."""

    layers: tuple[LayerStats, ...]

    @property
    def never_reached(self) -> tuple[str, ...]:
        """Names of the layers whose attention did not go through longctx."""
        return tuple(layer.name for layer in self.layers if layer.calls == 0)

    @property
    def density(self) -> Tensor | None:
        """Mean density of the layers that ran sparse, a scalar tensor."""
        densities = [layer.density for layer in self.layers if layer.density is not None]
        return torch.stack([density.cpu() for density in densities]).mean() if densities else None

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"{'layer':<{width}}  {'policy':<14} sparse  dense  density  why dense"]
        for layer in self.layers:
            density = "" if layer.density is None else f"{float(layer.density):.4f}"
            why = ", ".join(f"{reason} ({count})" for reason, count in layer.dense_reasons.items())
            lines.append(
                f"{layer.name:<{width}}  {layer.policy:<14} {layer.sparse_calls:>6}  {layer.dense_calls:>5}  "
                f"{density:>7}  {why if layer.calls else 'never reached'}"
            )
        return "\n".join(lines)
