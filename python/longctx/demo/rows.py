"""The rows of the table: what attends, and its control at full density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from longctx.prefill import (
    AShape,
    BlockTopK,
    Dense,
    FlexPrefill,
    LMInfinite,
    OracleBlocks,
    PerLayer,
    Policy,
    RandomBlocks,
    XAttention,
)

WINDOW = 1024
# Longer than any prompt, and more blocks than any has.
EVERYTHING = 1 << 30


@dataclass(frozen=True)
class Row:
    """One way to attend."""

    name: str
    policy: Policy | None = None  # None: the model's own SDPA
    full: Policy | None = None  # the same method told to keep everything
    by_length: Mapping[int, Policy] = field(default_factory=dict)  # instead of `policy` at these lengths
    is_reference: bool = False

    def policy_at(self, length: int) -> Policy | None:
        return self.by_length.get(length, self.policy)


SDPA = Row("SDPA")
DENSE = Row("Dense", Dense(), is_reference=True)
FLEX = Row("FlexPrefill", FlexPrefill(), FlexPrefill(gamma=1.0, min_budget=EVERYTHING))
WINDOW_ROW = Row(
    f"Window {WINDOW} (control)",
    AShape(num_sink_tokens=0, window_size=WINDOW),
    AShape(num_sink_tokens=0, window_size=EVERYTHING),
)
METHODS = (
    FLEX,
    Row(
        "AShape",
        AShape(num_sink_tokens=128, window_size=WINDOW),
        AShape(num_sink_tokens=128, window_size=EVERYTHING),
    ),
    Row("LMInfinite", LMInfinite(window_size=WINDOW), LMInfinite(window_size=1 << 17)),
    Row("BlockTopK", BlockTopK(top_k=16), BlockTopK(top_k=EVERYTHING)),
    Row("XAttention", XAttention(), XAttention(threshold=1.0)),
    Row(
        "Dense, then FlexPrefill",
        PerLayer({0: Dense()}, default=FlexPrefill()),
        PerLayer({0: Dense()}, default=FLEX.full or Dense()),
    ),
)


def controls(densities: Mapping[int, float]) -> tuple[Row, ...]:
    """Random and best blocks at the density that another method had at each length."""
    return tuple(
        Row(
            f"{method.__name__} (same density)",
            method(density=max(densities.values())),
            method(density=1.0),
            {length: method(density=density) for length, density in densities.items()},
        )
        for method in (RandomBlocks, OracleBlocks)
    )
