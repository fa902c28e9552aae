"""Policies with small options, and the kinds of calls that every policy must serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longctx.prefill import (
    AShape,
    AttentionContext,
    BlockTopK,
    Dense,
    FlexPrefill,
    OracleBlocks,
    PerLayer,
    Policy,
    RandomBlocks,
    XAttention,
)
from op_case import int32, randn

POLICIES: dict[str, Policy] = {
    "dense": Dense(),
    "ashape": AShape(num_sink_tokens=5, window_size=40),
    "flexprefill": FlexPrefill(block_size=16, min_budget=16, gamma=0.6),
    "flexprefill_vertical_slash": FlexPrefill(block_size=32, min_budget=0, gamma=0.4, tau=0.0),
    "flexprefill_query_aware": FlexPrefill(block_size=16, min_budget=0, gamma=0.5, tau=2.0),
    "blocktopk": BlockTopK(block_size=16, top_k=2),
    "xattention": XAttention(block_size=32, stride=8, threshold=0.5),
    "random": RandomBlocks(density=0.3, block_size=16),
    "oracle": OracleBlocks(density=0.3, block_size=16),
    "perlayer": PerLayer({0: Dense()}, default=XAttention(block_size=16, stride=4, threshold=0.7)),
}
# The same policies with options that keep everything.
FULL: dict[str, Policy] = {
    "dense": Dense(),
    "ashape": AShape(num_sink_tokens=0, window_size=1000),
    "ashape_sinks": AShape(num_sink_tokens=1000, window_size=1),
    "flexprefill_vertical_slash": FlexPrefill(block_size=16, min_budget=1000, gamma=0.1, tau=0.0),
    "flexprefill_query_aware": FlexPrefill(block_size=16, min_budget=0, gamma=1.0, tau=2.0),
    "flexprefill_gamma": FlexPrefill(block_size=32, min_budget=0, gamma=1.0),
    "blocktopk": BlockTopK(block_size=16, top_k=1000),
    "xattention": XAttention(block_size=16, stride=8, threshold=1.0),
    "random": RandomBlocks(density=1.0, block_size=16),
    "oracle": OracleBlocks(density=1.0, block_size=16),
}


@dataclass(frozen=True)
class Call:
    """q, k, v and the context of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> AttentionContext:
        return AttentionContext(layer_idx=1, **self.options)

    def with_(self, **options: Any) -> Call:
        return Call(self.q, self.k, self.v, self.options | options)


def call(batch: int, seqlen_q: int, seqlen_k: int, *, seed: int = 0, head_dim: int = 16, **options: Any) -> Call:
    """GQA of two query heads a kv head, scores sharp enough for patterns to differ between heads."""
    q = 2.0 * randn(batch, 4, seqlen_q, head_dim, seed=seed)
    k = randn(batch, 2, seqlen_k, head_dim, seed=seed + 1)
    # Sequences drift, so that block means differ and the block map predicts something.
    drift = 0.6 * randn(batch, 2, -(-seqlen_k // 16), head_dim, seed=seed + 2).repeat_interleave(16, 2)[:, :, :seqlen_k]
    return Call(q, k + drift, randn(batch, 2, seqlen_k, 24, seed=seed + 3), options)


def rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding of 12 of 16 channels, base 100."""
    angles = positions[..., None].float() * 100.0 ** (-torch.arange(6, device=positions.device) / 6.0)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def causal_ranges(batch: int, seqlen: int) -> Tensor:
    ranges = torch.zeros(batch, 1, seqlen, 2, dtype=torch.int32)
    ranges[..., 1] = torch.arange(1, seqlen + 1)
    return ranges


def left_padded(batch: int, seqlen: int, padding: list[int]) -> Tensor:
    ranges = causal_ranges(batch, seqlen)
    for b, length in enumerate(padding):
        ranges[b, :, :, 0] = length
    return ranges


def right_padded(batch: int, seqlen: int, padding: list[int]) -> Tensor:
    ranges = causal_ranges(batch, seqlen)
    for b, length in enumerate(padding):
        ranges[b, :, seqlen - length :] = 0
    return ranges


def documents(seqlen: int, starts: list[int]) -> Tensor:
    ranges = causal_ranges(1, seqlen)
    for start in starts:
        ranges[:, :, start:, 0] = start
    return ranges


def gap(seqlen: int, first: int, last: int) -> Tensor:
    """Keys `first:last` are padding between two turns."""
    ranges = causal_ranges(1, seqlen).expand(1, 2, seqlen, 2).clone()
    ranges[:, 0, :last] = 0
    ranges[:, 0, last:, 1] = first
    ranges[:, 1, last:, 0] = last
    ranges[:, 1, first:last, 0] = ranges[:, 1, first:last, 1]
    return ranges


CALLS: dict[str, Call] = {
    "batch": call(2, 150, 150, seed=10),
    "aligned": call(1, 128, 128, seed=20),
    "chunk": call(2, 61, 170, seed=30),
    "more_queries_than_keys": call(1, 90, 50, seed=35),
    "one_query": call(1, 1, 70, seed=40),
    "short": call(1, 5, 5, seed=50),
    "packed": call(
        1, 190, 210, seed=60, cu_seqlens_q=int32(0, 0, 90, 107, 190), cu_seqlens_k=int32(0, 0, 90, 107, 210)
    ),
    "seqused": call(2, 40, 160, seed=70, seqused_k=int32(90, 143)),
    "left_padded": call(2, 150, 150, seed=80, key_ranges=left_padded(2, 150, [21, 0])),
    "right_padded": call(2, 150, 150, seed=90, key_ranges=right_padded(2, 150, [0, 37])),
    "documents": call(1, 150, 150, seed=100, key_ranges=documents(150, [33, 90])),
    "gap": call(1, 150, 150, seed=110, key_ranges=gap(150, 50, 75)),
    "window": call(1, 150, 150, seed=120, window_size_left=70),
    "capped": call(1, 100, 100, seed=130, softcap=4.0, softmax_scale=0.4, sinks=randn(4, seed=131)),
}
