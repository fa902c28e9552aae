"""FlexPrefill: per head, one of two patterns and as many blocks as it takes to reach a share of the softmax mass.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference"
(ICLR 2025, arXiv 2502.20766).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.ops import block_scores, select_blocks
from longctx.prefill.cost import Lengths
from longctx.prefill.grid import Rows, Sequences, ceil_div, first_visible, visible_tiles
from longctx.prefill.policy import AttentionContext, Pattern, Policy
from longctx.prefill.probe import Probe, shown


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Policy):
    """The last `block_size` queries of a sequence stand for all of it and decide the pattern of each query head.

    A head whose block map (block means of q against block means of k) predicts what the last queries attend to, to
    within a Jensen-Shannon distance of `tau`, is query-aware: it visits the best tiles of that map, up to the share
    `gamma` of its mass. Any other head is vertical-slash: it visits the key blocks and the diagonals that hold a share
    `gamma` of the last queries' mass, each at least `min_budget` tokens.

    Mass is counted in blocks and the crossing block is kept, so the share is reached; counting tokens and rounding to
    blocks, as the authors' code does, may fall short of it.
    """

    name: ClassVar[str] = "flexprefill"
    gamma: float = 0.95
    tau: float = 0.1
    block_size: int = 128
    min_budget: int = 1024

    def __post_init__(self) -> None:
        self._require("gamma", 0.0 < self.gamma <= 1.0, "be in (0, 1]")
        self._require("tau", self.tau >= 0.0, "be >= 0")
        self._require("min_budget", self.min_budget >= 0, "be >= 0")
        self._require_one_of("block_size", 16, 32, 64, 128)

    def least_cost(self, lengths: Lengths) -> float:
        # The probe scores all keys twice, without values.
        return lengths.kept(self.min_budget) + lengths.probed(self.block_size)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        self._require_causal(context)
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if 0 in shape:
            return Pattern.of(q, k, context)
        blocks: dict[str, Any] = {"block_size_q": self.block_size, "block_size_k": self.block_size}
        seqs = Sequences.of(context, shape, q.device)
        rows = Rows.of(seqs, shape[2], self.block_size)
        visible = visible_tiles(context, shape, rows, **blocks)[:, None]
        probe = Probe.of(q, k, context, self.block_size)

        # Which pattern: [num_seqs, heads].
        options: dict[str, Any] = {**blocks, "softmax_scale": context.softmax_scale, **context.lengths()}
        block_map = shown(block_scores(q, k, **options), visible, context)
        vertical, slash = probe.vertical_and_slash(k)
        # Unless a short block ends the map, its last row is the probe's; asking again would read all of k again.
        is_last_row = shape[2] % self.block_size == 0 and not seqs.packed and context.key_ranges is None
        estimate = block_map[:, :, -1] if is_last_row else probe.block_map(k)
        query_aware = jensen_shannon_distance(estimate, vertical) < self.tau

        # Vertical-slash; of a query-aware head only the minimal budget.
        gamma = torch.where(query_aware, 0.0, self.gamma)[..., None]
        min_blocks = ceil_div(self.min_budget, self.block_size)
        columns, diagonals = keep_mass(vertical, gamma, min_blocks), keep_mass(slash, gamma, min_blocks)
        diagonals[..., :1] = True
        tiles = first_visible(visible) | vertical_slash_tiles(columns, diagonals, rows, seqs, self.block_size)

        # Query-aware; the map of any other head is emptied.
        block_map.mul_(query_aware[rows.seq].movedim(2, 1)[..., None])
        options = {**blocks, **context.list_options(q, k), "method": "cumulative", "scope": "head"}
        indptr, indices = select_blocks(block_map, value=self.gamma, **options)
        best = Pattern.of(q, k, context, block_indptr=indptr, block_indices=indices, **blocks).to_tiles()
        return Pattern.of_tiles(q, k, context, (tiles | best) & visible, self.block_size)


def jensen_shannon_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the divergence (natural log) of distributions along the last dim."""
    middle = (p + q) / 2
    divergence = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (divergence.sum(-1) / 2).clamp(min=0.0).sqrt()


def keep_mass(mass: Tensor, gamma: Tensor, at_least: int) -> Tensor:
    """The fewest largest entries of each row whose sum reaches the share `gamma`, but `at_least` so many: bool."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    keep = (reached - ordered < gamma * reached[..., -1:]) | (rank < at_least)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def vertical_slash_tiles(columns: Tensor, diagonals: Tensor, rows: Rows, seqs: Sequences, block_size: int) -> Tensor:
    """Tiles on a kept key block or touched by a kept block of diagonals: bool [batch, heads, num_rows, num_k_blocks].

    A tile touches up to three blocks of diagonals (two where queries and keys are aligned): any of them is enough.
    """
    num_k_blocks, num_rows = columns.shape[-1], rows.index.shape[1]
    # What a tile touches depends on its row minus its key block: [num_seqs, heads, num_rows + num_k_blocks - 1].
    step = torch.arange(1 - num_k_blocks, num_rows, device=columns.device) * block_size
    nearest = (seqs.len_k - seqs.len_q)[:, None] + step - (block_size - 1)  # last key of the tile to its first query
    farthest = nearest + 2 * (block_size - 1)
    first, last = (d.clamp(min=0) // block_size for d in (nearest, farthest))
    kept_before = pad(diagonals.cumsum(-1), (1, 0))
    bins = torch.stack([first, last + 1], 1).clamp(max=num_k_blocks)[:, :, None].expand(-1, -1, columns.shape[1], -1)
    kept = kept_before[:, None].expand(-1, 2, -1, -1).gather(3, bins).diff(dim=1)[:, 0] > 0
    touched = kept & (farthest >= 0)[:, None]

    distance = rows.index[..., None] - torch.arange(num_k_blocks, device=columns.device) + num_k_blocks - 1
    touched = touched[rows.seq].gather(3, distance[:, :, None].expand(-1, -1, columns.shape[1], -1))
    return (touched | columns[rows.seq]).movedim(2, 1)
