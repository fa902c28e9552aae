"""Sinks and a sliding window: the Lambda- or A-shaped mask.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453); as a static prefill
pattern in Jiang et al., "MInference 1.0" (arXiv 2407.02490), whose 1024 sinks and 4096 local tokens are the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longctx.prefill.cost import Lengths
from longctx.prefill.grid import token_intervals, token_rows
from longctx.prefill.policy import AttentionContext, Pattern, Policy


@dataclass(frozen=True, kw_only=True)
class AShape(Policy):
    """Every query sees the first `num_sink_tokens` keys and the last `window_size` keys, itself included.

    Under `key_ranges` the sinks are the first keys that the query may see, so that padding on the left or an earlier
    document cannot use them up. Where padding splits what a query sees into two ranges, sinks end with the first, and a
    window that reaches across the gap shows all of it.
    """

    name: ClassVar[str] = "ashape"
    num_sink_tokens: int = 1024
    window_size: int = 4096

    def __post_init__(self) -> None:
        self._require("num_sink_tokens", self.num_sink_tokens >= 0, "be >= 0")
        self._require("window_size", self.window_size >= 1, "be >= 1")

    def least_cost(self, lengths: Lengths) -> float:
        return lengths.kept(self.num_sink_tokens + self.window_size)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        self._require_causal(context)
        if context.key_ranges is None and context.window_size_left < 0:
            window_size_left = self.window_size - 1
            return Pattern.of(q, k, context, window_size_left=window_size_left, num_sink_tokens=self.num_sink_tokens)
        sinks, window = sinks_and_window(q, k, context, self.num_sink_tokens, self.window_size)
        key_ranges = torch.stack([sinks, window], 1).int()
        return Pattern.of(q, k, context, key_ranges=key_ranges, window_size_left=-1, num_sink_tokens=0)


def sinks_and_window(
    q: Tensor, k: Tensor, context: AttentionContext, num_sink_tokens: int, window_size: int
) -> tuple[Tensor, Tensor]:
    """The two key ranges of every query, int64 [batch, seqlen_q, 2] on the key axis; without overlap."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    visible = token_intervals(context, shape, q.device)
    if context.num_sink_tokens > 0 or visible.shape[1] > 2:
        raise ValueError(
            "longctx: sinks and a window inside a context with its own `num_sink_tokens` or with a window beside two "
            "`key_ranges` are not supported"
        )
    rows = token_rows(context, shape, q.device)
    begin, end = visible[:, -1].unbind(-1)
    first_local = rows.position - window_size + 1
    local_begin = torch.maximum(begin, first_local)
    sinks_begin, sinks_end = begin, torch.minimum(begin + num_sink_tokens, torch.minimum(local_begin, end))
    if visible.shape[1] == 2:
        gap_begin, gap_end = visible[:, 0].unbind(-1)
        split = gap_begin < gap_end
        before_gap = torch.where(first_local < gap_end, gap_end, torch.minimum(gap_begin + num_sink_tokens, gap_end))
        sinks_begin = torch.where(split, gap_begin, sinks_begin)
        sinks_end = torch.where(split, before_gap, sinks_end)
    ranges = torch.stack([sinks_begin, sinks_end, local_begin, end], -1) + rows.k_begin[..., None]
    return ranges[..., :2], ranges[..., 2:]
