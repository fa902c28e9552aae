"""What the last queries of a prompt attend to, the estimate of MInference (arXiv 2407.02490) and FlexPrefill."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.ops import attention, attention_mass, block_scores
from longctx.prefill.grid import Rows, Sequences, Shape, ceil_div, token_intervals, visible_tiles
from longctx.prefill.policy import AttentionContext


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """The last queries of every sequence, as a call of its own: a batch, or packed behind each other."""

    q: Tensor
    context: AttentionContext
    block_size: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, context: AttentionContext, block_size: int) -> Probe:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        seqs = Sequences.of(context, shape, q.device)
        moved: dict[str, Any] = {}
        if seqs.packed:
            num_seqs = seqs.len_q.numel()
            end = seqs.len_q.clamp(max=block_size).cumsum(0)
            row = torch.arange(min(shape[2], num_seqs * block_size), device=q.device)
            seq = torch.searchsorted(end, row, right=True).clamp(max=num_seqs - 1)
            index = ((seqs.q_begin + seqs.len_q - end)[seq] + row).clamp(0, max(shape[2] - 1, 0))[None]
            moved["cu_seqlens_q"] = pad(end, (1, 0)).int()
        else:
            length = min(shape[2], block_size)
            end = seqs.len_q
            if context.key_ranges is not None:  # padding on the right is not a query
                begin_key, end_key = token_intervals(context, shape, q.device).unbind(-1)
                row = torch.arange(1, shape[2] + 1, device=q.device)
                end = ((begin_key < end_key).any(1) * row).amax(1).clamp(min=length)
            index = end[:, None] - length + torch.arange(length, device=q.device)
            moved["seqused_k"] = (seqs.len_k - seqs.len_q + end).int()
        if context.key_ranges is not None:
            where = index[:, None, :, None].expand(-1, context.key_ranges.shape[1], -1, 2)
            moved["key_ranges"] = context.key_ranges.gather(2, where)
        last = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        return cls(q=last, context=dataclasses.replace(context, **moved), block_size=block_size)

    def vertical_and_slash(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the probe's mass on each key block, and on each block of diagonals counted from the main one.

        Both [num_seqs, heads, num_k_blocks], float64.
        """
        options = self.context.score_options()
        _, lse = attention(self.q, k, k[..., :1], **options)
        by_key, by_diagonal = attention_mass(self.q, k, lse, reduce="both", **options)
        seqs = self._sequences(k)
        end = seqs.k_begin + seqs.len_k
        offset = torch.arange(ceil_div(k.shape[2], self.block_size) + 1, device=k.device) * self.block_size
        keys = torch.minimum(seqs.k_begin[:, None] + offset, end[:, None])
        # The main diagonal is the last that a sequence owns; the first belongs to its first key.
        diagonals = torch.maximum((seqs.q_begin + end)[:, None] - offset, (seqs.q_begin + seqs.k_begin)[:, None])
        return normalized(interval_sums(by_key, keys)), normalized(-interval_sums(by_diagonal, diagonals))

    def block_map(self, k: Tensor) -> Tensor:
        """The same share of each key block, as predicted by block means: float32 [num_seqs, heads, num_k_blocks]."""
        blocks: dict[str, Any] = {"block_size_q": self.block_size, "block_size_k": self.block_size}
        scores = block_scores(self.q, k, **blocks, softmax_scale=self.context.softmax_scale, **self.context.lengths())
        seqs = self._sequences(k)
        rows = Rows.of(seqs, self.q.shape[2], self.block_size)
        visible = visible_tiles(self.context, self._shape(k), rows, **blocks)[:, None]
        scores = shown(scores, visible, self.context)
        if not seqs.packed:
            return scores[:, :, 0]
        row = (seqs.len_q > 0).cumsum(0) - 1
        return scores[0].movedim(1, 0)[row.clamp(min=0)]

    def _shape(self, k: Tensor) -> Shape:
        return (self.q.shape[0], self.q.shape[1], self.q.shape[2], k.shape[2])

    def _sequences(self, k: Tensor) -> Sequences:
        return Sequences.of(self.context, self._shape(k), k.device)


def shown(scores: Tensor, visible: Tensor, context: AttentionContext) -> Tensor:
    """`block_scores` over the tiles that the whole predicate shows; the op itself knows lengths and causality only."""
    if context.key_ranges is None and context.window_size_left < 0 and context.window_size_right < 0:
        return scores
    return normalized(scores * visible)


def normalized(mass: Tensor) -> Tensor:
    """`mass` divided by its sum over the last dim; nothing stays nothing."""
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def interval_sums(mass: Tensor, bounds: Tensor) -> Tensor:
    """Sums of [batch or 1, heads, n] between neighbours of `bounds` [num_seqs, m + 1]: [num_seqs, heads, m]."""
    prefix = mass.new_zeros(*mass.shape[:2], mass.shape[2] + 1, dtype=torch.float64)
    torch.cumsum(mass, -1, dtype=torch.float64, out=prefix[..., 1:])
    prefix = prefix.expand(bounds.shape[0], -1, -1)
    return prefix.gather(2, bounds[:, None].expand(-1, prefix.shape[1], -1)).diff(dim=-1)
