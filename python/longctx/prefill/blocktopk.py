"""The best key blocks of every query block, by the score of block means.

The block-sparse pattern of Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic
Sparse Attention" (NeurIPS 2024, arXiv 2407.02490), whose 100 blocks of 64 tokens are the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.ops import block_scores, select_blocks
from longctx.prefill.cost import Lengths
from longctx.prefill.grid import Rows, Sequences, first_visible, visible_tiles
from longctx.prefill.policy import AttentionContext, Pattern, Policy


@dataclass(frozen=True, kw_only=True)
class BlockTopK(Policy):
    """`top_k` blocks a row beside the first `num_first_blocks` and the last `num_local_blocks` visible ones.

    A lone token that matters is averaged away within its block: this is the cheapest selection, not the safest.
    """

    name: ClassVar[str] = "blocktopk"
    top_k: int = 100
    block_size: int = 64
    num_first_blocks: int = 1
    num_local_blocks: int = 1

    def __post_init__(self) -> None:
        self._require("top_k", self.top_k >= 0, "be >= 0")
        self._require("num_first_blocks", self.num_first_blocks >= 0, "be >= 0")
        self._require("num_local_blocks", self.num_local_blocks >= 0, "be >= 0")
        self._require_one_of("block_size", 16, 32, 64, 128)

    def least_cost(self, lengths: Lengths) -> float:
        return lengths.kept((self.top_k + self.num_first_blocks + self.num_local_blocks) * self.block_size)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        self._require_causal(context)
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        blocks: dict[str, Any] = {"block_size_q": self.block_size, "block_size_k": self.block_size}
        rows = Rows.of(Sequences.of(context, shape, q.device), shape[2], self.block_size)
        visible = visible_tiles(context, shape, rows, **blocks)[:, None]
        # The softmax would not change the order within a row.
        options = {"softmax_scale": context.softmax_scale, **context.lengths()}
        scores = block_scores(q, k, **blocks, softmax=False, **options).masked_fill(~visible, -torch.inf)
        scores = scores.masked_fill(first_visible(visible, self.num_first_blocks), torch.inf)
        options = {**blocks, **context.list_options(q, k), "num_local": self.num_local_blocks}
        indptr, indices = select_blocks(scores, method="top_k", value=self.top_k + self.num_first_blocks, **options)
        return Pattern.of(q, k, context, block_indptr=indptr, block_indices=indices, **blocks)
