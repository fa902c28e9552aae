"""Whether a policy can pay: decided on the host before anything is selected, from lengths and budgets alone.

Costs are shares of dense causal attention over the same lengths, which scores every pair of a query and a key that it
sees once in `q k^T` and once in `p v`. What the data decide (how many blocks reach a share of the mass) is not known
yet, so a policy states what it does at least.
"""

from __future__ import annotations

from dataclasses import dataclass

# A policy that cannot save a tenth runs dense: it would have to win that back from the overhead of its own selection.
MAX_COST = 0.9
REASON = "nearly everything kept at this length"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of a causal call; its last query sees the last key."""

    seqlen_q: int
    seqlen_k: int
    window_size_left: int = -1  # self and this many earlier keys; -1 is open

    def num_pairs(self, keys_per_query: int | None = None) -> int:
        """Pairs of a query and a key when every query keeps `keys_per_query` of the keys it sees (default: all)."""
        limits = [self.seqlen_k]
        if self.window_size_left >= 0:
            limits.append(self.window_size_left + 1)
        if keys_per_query is not None:
            limits.append(keys_per_query)
        limit = min(limits)
        # Query i sees i + 1 + seqlen_k - seqlen_q keys: the sum of min(n, limit) over n = first + 1 .. seqlen_k.
        first = max(self.seqlen_k - self.seqlen_q, 0)
        rising_from, rising_to = min(first, limit), min(self.seqlen_k, limit)
        rising = (rising_to * (rising_to + 1) - rising_from * (rising_from + 1)) // 2
        return rising + limit * (self.seqlen_k - max(first, limit))

    def kept(self, keys_per_query: int) -> float:
        """Cost of attention when every query keeps that many of its keys."""
        return self.num_pairs(keys_per_query) / max(self.num_pairs(), 1)

    def probed(self, num_queries: int) -> float:
        """Cost of scoring all keys for the last `num_queries` queries, once in full."""
        return min(num_queries, self.seqlen_q) * self.seqlen_k / max(self.num_pairs(), 1)
