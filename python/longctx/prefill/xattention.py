"""XAttention: blocks scored by the sums of their antidiagonals.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring" (ICML 2025, arXiv 2503.16428).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from longctx.ops import block_scores, select_blocks
from longctx.prefill.cost import Lengths
from longctx.prefill.grid import Rows, Sequences, first_visible, visible_tiles
from longctx.prefill.policy import AttentionContext, Pattern, Policy


@dataclass(frozen=True, kw_only=True)
class XAttention(Policy):
    """Per query block the fewest key blocks whose estimated mass reaches `threshold`, with the first and its own.

    Every `stride x stride` square of scores is estimated by its antidiagonal, which crosses every vertical and slash
    line; a block's mass is the sum of its squares after the softmax. The estimate costs `1 / stride` of q k^T.
    """

    name: ClassVar[str] = "xattention"
    threshold: float = 0.9
    stride: int = 16
    block_size: int = 128

    def __post_init__(self) -> None:
        self._require_one_of("block_size", 16, 32, 64, 128)
        self._require("threshold", 0.0 < self.threshold <= 1.0, "be in (0, 1]")
        self._require_one_of("stride", 4, 8, 16, 32)
        self._require("stride", self.stride <= self.block_size, f"be at most block_size = {self.block_size}")

    def least_cost(self, lengths: Lengths) -> float:
        # The estimate is a part of q k^T, which is half of attention; the first block and its own are kept.
        return lengths.kept(2 * self.block_size) + 0.5 / self.stride

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        self._require_causal(context)
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        blocks: dict[str, Any] = {"block_size_q": self.block_size, "block_size_k": self.block_size}
        rows = Rows.of(Sequences.of(context, shape, q.device), shape[2], self.block_size)
        visible = visible_tiles(context, shape, rows, **blocks)[:, None]
        options = {"softmax_scale": context.softmax_scale, **context.lengths()}
        scores = block_scores(q, k, **blocks, method="antidiagonal", stride=self.stride, **options) * visible
        options = {**blocks, **context.list_options(q, k), "method": "cumulative", "value": self.threshold}
        indptr, indices = select_blocks(scores, num_first=1, num_local=1, **options)
        pattern = Pattern.of(q, k, context, block_indptr=indptr, block_indices=indices, **blocks)
        if context.key_ranges is None:
            return pattern
        # The first block of the axis may be padding; the first of what a row sees takes its part.
        return Pattern.of_tiles(q, k, context, pattern.to_tiles() | first_visible(visible), self.block_size)
