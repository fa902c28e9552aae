"""Where queries, keys and their blocks lie: the same device tensors for batches and for packed sequences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]  # batch, num_q_heads, seqlen_q, seqlen_k


def ceil_div(a: Any, b: int) -> Any:
    return (a + b - 1) // b


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicate:
    """Which keys a query sees: those in `key_ranges`, causal, and inside the window or among the sinks."""

    causal: bool = True
    window_size_left: int = -1  # self and this many earlier keys; -1 is open
    window_size_right: int = -1  # this many later keys; -1 is open
    num_sink_tokens: int = 0  # the first keys of a sequence, seen through any window
    key_ranges: Tensor | None = None  # int32 [batch, 1 or 2, seqlen_q, 2], half-open, on the key axis
    cu_seqlens_q: Tensor | None = None  # int32 [num_seqs + 1], with batch == 1
    cu_seqlens_k: Tensor | None = None  # int32 [num_seqs + 1]
    seqused_k: Tensor | None = None  # int32 [batch]: keys at or beyond it do not exist

    def predicate(self) -> dict[str, Any]:
        """These fields as keywords of an op."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Predicate)}

    def lengths(self) -> dict[str, Any]:
        """The fields that say where sequences begin and end."""
        return {name: getattr(self, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Where each sequence lies on the query and the key axis: int64 [num_seqs] each."""

    q_begin: Tensor
    len_q: Tensor
    k_begin: Tensor
    len_k: Tensor
    packed: bool

    @classmethod
    def of(cls, predicate: Predicate, shape: Shape, device: torch.device) -> Sequences:
        batch, _, seqlen_q, seqlen_k = shape
        if predicate.cu_seqlens_q is not None and predicate.cu_seqlens_k is not None:
            cu_q, cu_k = predicate.cu_seqlens_q.long(), predicate.cu_seqlens_k.long()
            return cls(q_begin=cu_q[:-1], len_q=cu_q.diff(), k_begin=cu_k[:-1], len_k=cu_k.diff(), packed=True)
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        used = zeros + seqlen_k if predicate.seqused_k is None else predicate.seqused_k.long()
        return cls(q_begin=zeros, len_q=zeros + seqlen_q, k_begin=zeros, len_k=used, packed=False)

    def of_keys(self) -> Sequences:
        """The key axis seen as a query axis: `Rows` of it are key blocks."""
        return dataclasses.replace(self, q_begin=self.k_begin, len_q=self.len_k)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Blocks of consecutive queries, int64 [batch, num_rows] each; positions count from the sequence's first key.

    A packed call has `ceil(seqlen_q / block_size) + num_seqs` rows, of which the last ones are empty.
    """

    seq: Tensor  # sequence that owns the row
    index: Tensor  # of the row within its sequence
    q_begin: Tensor  # first query of the row on the query axis
    num_queries: Tensor  # 0 where the row is empty
    position: Tensor  # key position of the row's first query
    k_begin: Tensor  # first key of the sequence on the key axis
    len_k: Tensor  # keys of the sequence

    @classmethod
    def of(cls, seqs: Sequences, seqlen: int, block_size: int) -> Rows:
        num_seqs, device = seqs.len_q.numel(), seqs.len_q.device
        if seqs.packed:
            rows_per_seq = ceil_div(seqs.len_q, block_size)
            end_row = rows_per_seq.cumsum(0)
            row = torch.arange(ceil_div(seqlen, block_size) + num_seqs, device=device)[None]
            seq = torch.searchsorted(end_row, row, right=True).clamp(max=num_seqs - 1)
            index = row - (end_row - rows_per_seq)[seq]
        else:
            index = torch.arange(ceil_div(seqlen, block_size), device=device).expand(num_seqs, -1)
            seq = torch.arange(num_seqs, device=device)[:, None].expand_as(index)
        first = index * block_size
        return cls(
            seq=seq,
            index=index,
            q_begin=seqs.q_begin[seq] + first,
            num_queries=(seqs.len_q[seq] - first).clamp(0, block_size),
            position=first + (seqs.len_k - seqs.len_q)[seq],
            k_begin=seqs.k_begin[seq],
            len_k=seqs.len_k[seq],
        )

    def tokens(self, block_size: int, seqlen: int) -> tuple[Tensor, Tensor]:
        """Query indices of every row [batch, num_rows, block_size], within bounds, and which of them are its own."""
        offset = torch.arange(block_size, device=self.seq.device)
        index = (self.q_begin[..., None] + offset).clamp(0, max(seqlen - 1, 0))
        return index, offset < self.num_queries[..., None]


def token_rows(predicate: Predicate, shape: Shape, device: torch.device) -> Rows:
    """One row per query: [batch, seqlen_q]."""
    rows = Rows.of(Sequences.of(predicate, shape, device), shape[2], 1)
    return Rows(**{f.name: getattr(rows, f.name)[:, : shape[2]] for f in dataclasses.fields(Rows)})


def token_intervals(predicate: Predicate, shape: Shape, device: torch.device) -> Tensor:
    """The key positions each query sees, a union of half-open intervals: int64 [batch, 1 to 4, seqlen_q, 2]."""
    rows = token_rows(predicate, shape, device)
    zero = torch.zeros_like(rows.position)
    end = torch.where(rows.num_queries > 0, rows.len_k, zero)
    if predicate.causal:
        end = torch.minimum(end, rows.position + 1)
    begin, window_end = zero, end
    if predicate.window_size_left >= 0:
        begin = (rows.position - predicate.window_size_left).clamp(min=0)
    if predicate.window_size_right >= 0:
        window_end = torch.minimum(end, rows.position + predicate.window_size_right + 1)
    structure = torch.stack([begin, window_end], -1)[:, None]
    if predicate.num_sink_tokens > 0:
        sinks = torch.stack([zero, end.clamp(max=predicate.num_sink_tokens)], -1)[:, None]
        structure = torch.cat([structure, sinks], 1)
    if predicate.key_ranges is None:
        return structure
    ranges = (predicate.key_ranges.long() - rows.k_begin[:, None, :, None])[:, None]
    structure = structure[:, :, None]
    begins = torch.maximum(structure[..., 0], ranges[..., 0])
    ends = torch.minimum(structure[..., 1], ranges[..., 1])
    return torch.stack([begins, ends], -1).flatten(1, 2)


def block_intervals(predicate: Predicate, shape: Shape, rows: Rows, block_size_q: int, block_size_k: int) -> Tensor:
    """The key blocks each row of queries sees, as intervals: int64 [batch, 1 to 4, num_rows, 2]."""
    intervals = token_intervals(predicate, shape, rows.seq.device)
    if shape[2] == 0:
        return intervals.new_zeros(intervals.shape[0], intervals.shape[1], rows.seq.shape[1], 2)
    index, own = rows.tokens(block_size_q, shape[2])
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    begin, end = intervals.movedim(1, 2)[batch, index].unbind(-1)  # [batch, num_rows, block_size_q, 1 to 4]
    seen = own[..., None] & (begin < end)
    far = torch.iinfo(torch.int32).max
    begin = begin.masked_fill(~seen, far).amin(2) // block_size_k
    end = ceil_div(end.masked_fill(~seen, 0).amax(2), block_size_k)
    return torch.stack([begin, end], -1).movedim(2, 1)


def visible_tiles(predicate: Predicate, shape: Shape, rows: Rows, block_size_q: int, block_size_k: int) -> Tensor:
    """Bool [batch, num_rows, num_k_blocks]: tiles in which dense attention has a score."""
    begin, end = block_intervals(predicate, shape, rows, block_size_q, block_size_k)[..., None].unbind(-2)
    block = torch.arange(ceil_div(shape[3], block_size_k), device=begin.device)
    return ((block >= begin) & (block < end)).any(1)


def first_visible(visible: Tensor, count: int = 1) -> Tensor:
    """The first `count` tiles that each row sees, where attention sinks live whatever the padding: bool."""
    return visible & (visible.cumsum(-1) <= count)


def disjoint(intervals: Tensor) -> Tensor:
    """The same union of intervals [batch, n, num_rows, 2], in order and without overlap."""
    begin, order = intervals[..., 0].sort(dim=1)
    end = intervals[..., 1].gather(1, order)
    covered = torch.cat([torch.zeros_like(end[:, :1]), end.cummax(1).values[:, :-1]], 1)
    begin = torch.maximum(begin, covered)
    return torch.stack([begin, torch.maximum(begin, end)], -1)


def count_blocks(intervals: Tensor) -> Tensor:
    """Length of the union of each row's intervals: [batch, n, num_rows, 2] -> int64 [batch, num_rows]."""
    return disjoint(intervals).diff(dim=-1).sum((1, 3))


def lower_bound(values: Tensor, first: Tensor, last: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry >= `target` in each ascending stretch `values[first:last]`; `last` if there is none."""
    for _ in range(values.numel().bit_length()):
        middle = (first + last) // 2
        below = (first < last) & (values[middle.clamp(max=values.numel() - 1)] < target)
        first, last = torch.where(below, middle + 1, first), torch.where(below, last, middle)
    return first
