"""Controls at a given density: a selection that knows nothing, and one that knows everything.

A method's worth is where it stands between the two at equal density.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.ops import attention, attention_mass
from longctx.prefill.grid import Rows, Sequences, Shape, ceil_div, token_intervals, visible_tiles
from longctx.prefill.policy import AttentionContext, Pattern, Policy


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Policy):
    """The share `density` of every row's visible blocks: the first, the last, and others drawn by `seed`.

    The draw depends on seed, layer, head, row and block alone: the same on every device, alone or in a batch.
    """

    name: ClassVar[str] = "random"
    density: float = 0.1
    block_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("density", 0.0 < self.density <= 1.0, "be in (0, 1]")
        self._require("seed", self.seed >= 0, "be >= 0")
        self._require_one_of("block_size", 16, 32, 64, 128)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        rows, visible = _rows_and_visible(q, k, context, self.block_size)
        head = torch.arange(q.shape[1], device=q.device)[:, None, None] + context.head_offset
        block = torch.arange(visible.shape[-1], device=q.device)
        draw = torch.full_like(head, self.seed % 2**32)
        for coordinate in (torch.full_like(head, context.layer_idx or 0), head, rows.index[:, None, :, None], block):
            draw = _mix(draw ^ coordinate)
        ends = (visible.cumsum(-1) == 1) | (visible.flip(-1).cumsum(-1).flip(-1) == 1)
        draw = draw.masked_fill(ends, 2**32)
        return Pattern.of_tiles(q, k, context, _best(draw, visible, self.density, 2), self.block_size)


@dataclass(frozen=True, kw_only=True)
class OracleBlocks(Policy):
    """The share `density` of every row's visible blocks that holds the most softmax mass, measured exactly.

    Costs more than dense attention, in memory bounded by the block map.
    """

    name: ClassVar[str] = "oracle"
    density: float = 0.1
    block_size: int = 128

    def __post_init__(self) -> None:
        self._require("density", 0.0 < self.density <= 1.0, "be in (0, 1]")
        self._require_one_of("block_size", 16, 32, 64, 128)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        _, visible = _rows_and_visible(q, k, context, self.block_size)
        tiles = _best(block_masses(q, k, context, self.block_size), visible, self.density, 1)
        return Pattern.of_tiles(q, k, context, tiles, self.block_size)


def block_masses(q: Tensor, k: Tensor, context: AttentionContext, block_size: int) -> Tensor:
    """Softmax mass of every tile, summed over its rows: float32 [batch, num_q_heads, num_q_blocks, num_k_blocks]."""
    shape: Shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    seqs = Sequences.of(context, shape, q.device)
    rows, key_rows = Rows.of(seqs, shape[2], block_size), Rows.of(seqs.of_keys(), shape[3], block_size)
    if 0 in shape:
        return q.new_zeros(shape[0], shape[1], rows.seq.shape[1], ceil_div(shape[3], block_size), dtype=torch.float32)
    visible = token_intervals(context, shape, q.device)
    if visible.shape[1] > 2:
        raise ValueError(f"longctx::oracle: a query may see at most 2 ranges of keys; got up to {visible.shape[1]}")
    _, lse = attention(q, k, k[..., :1], **context.score_options())
    index, own = rows.tokens(block_size, shape[2])
    # A key block of a packed call is one of all key blocks, sequence behind sequence.
    first_block = key_rows.q_begin.new_zeros(seqs.len_k.numel())
    if seqs.packed:
        first_block = pad(ceil_div(seqs.len_k, block_size).cumsum(0), (1, -1))
    block = torch.arange(ceil_div(shape[3], block_size), device=q.device)
    masses = []
    for b in range(shape[0]):  # the rows of one batch entry, as a batch that shares its keys
        offsets = torch.where(key_rows.num_queries[b] > 0, key_rows.q_begin[b], shape[3])
        offsets = pad(offsets, (0, 1), value=shape[3]).int()
        ranges = visible[b][:, index[b]].movedim(1, 0)
        ranges = (ranges + rows.k_begin[b][:, None, None, None]).masked_fill(~own[b][:, None, :, None], 0).int()
        mass = attention_mass(
            q[b][:, index[b]].movedim(1, 0),
            k[b].expand(index.shape[1], -1, -1, -1),
            lse[b][:, index[b]].movedim(1, 0).contiguous(),
            segment_offsets=offsets,
            causal=False,
            key_ranges=ranges,
            softmax_scale=context.softmax_scale,
            softcap=context.softcap,
        )
        where = (first_block[rows.seq[b]][:, None] + block).clamp(max=mass.shape[-1] - 1)
        masses.append(mass.gather(2, where[:, None].expand(-1, shape[1], -1)).movedim(0, 1))
    return torch.stack(masses)


def _rows_and_visible(q: Tensor, k: Tensor, context: AttentionContext, block_size: int) -> tuple[Rows, Tensor]:
    shape: Shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    rows = Rows.of(Sequences.of(context, shape, q.device), shape[2], block_size)
    return rows, visible_tiles(context, shape, rows, block_size, block_size)[:, None]


def _best(scores: Tensor, visible: Tensor, density: float, at_least: int) -> Tensor:
    """The share `density` of every row's visible tiles with the highest scores, ties by index: bool."""
    order = scores.masked_fill(~visible, -1).argsort(dim=-1, descending=True, stable=True)
    count = (density * visible.sum(-1, keepdim=True)).round().clamp(min=at_least)
    keep = (torch.arange(order.shape[-1], device=order.device) < count).expand_as(order)
    return torch.zeros_like(keep).scatter(-1, order, keep) & visible


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) that spreads every bit over all: Wellons' lowbias32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
