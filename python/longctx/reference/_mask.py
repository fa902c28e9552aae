"""Which keys a query row sees, as boolean tensors straight from the definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Sequence(NamedTuple):
    """Where one sequence lies: rows `q_begin:q_end` and keys `k_begin:k_end` of a batch entry."""

    batch: int
    q_begin: int
    q_end: int
    k_begin: int
    k_end: int


def sequences(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Iterator[Sequence]:
    """One sequence a batch entry, or the sequences packed behind each other in the only entry."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for s in range(len(q_ends) - 1):
            yield Sequence(0, q_ends[s], q_ends[s + 1], k_ends[s], k_ends[s + 1])
        return
    lengths = [seqlen_k] * batch if seqused_k is None else seqused_k.tolist()
    for b in range(batch):
        yield Sequence(b, 0, seqlen_q, 0, lengths[b])


def visible_keys(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    num_sink_tokens: int = 0,
    key_ranges: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """The predicate: bool [batch, seqlen_q, seqlen_k]."""
    mask = torch.zeros(batch, seqlen_q, seqlen_k, dtype=torch.bool)
    for seq in sequences(batch, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        len_q, len_k = seq.q_end - seq.q_begin, seq.k_end - seq.k_begin
        key = torch.arange(len_k)[None, :]
        position = torch.arange(len_q)[:, None] + (len_k - len_q)
        in_window = torch.ones(len_q, len_k, dtype=torch.bool)
        if window_size_left >= 0:
            in_window &= position - key <= window_size_left
        if window_size_right >= 0:
            in_window &= key - position <= window_size_right
        visible = in_window | (key < num_sink_tokens)
        if causal:
            visible &= key <= position
        mask[seq.batch, seq.q_begin : seq.q_end, seq.k_begin : seq.k_end] = visible
    if key_ranges is not None:
        key = torch.arange(seqlen_k)
        first, last = key_ranges.cpu().long()[..., None].unbind(-2)  # [batch, R, seqlen_q, 1]
        mask &= ((first <= key) & (key < last)).any(dim=1)
    return mask


def listed_keys(
    block_indptr: Tensor,
    block_indices: Tensor,
    block_size_q: int,
    block_size_k: int,
    *,
    batch: int,
    num_q_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """The block list: bool [batch, num_q_heads, seqlen_q, seqlen_k]."""
    mask = torch.zeros(batch, num_q_heads, seqlen_q, seqlen_k, dtype=torch.bool)
    within = torch.arange(block_size_k)
    pattern_heads = block_indptr.shape[1]
    row = 0  # packed sequences own consecutive rows of the list
    for seq in sequences(batch, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        if cu_seqlens_q is None:
            row = 0
        pattern = block_indptr.cpu()[seq.batch if len(block_indptr) > 1 else 0]
        for q_begin in range(seq.q_begin, seq.q_end, block_size_q):
            q_end = min(q_begin + block_size_q, seq.q_end)
            for head in range(num_q_heads):
                first, last = pattern[head * pattern_heads // num_q_heads, row : row + 2].tolist()
                blocks = block_indices[first:last].cpu().long()
                keys = seq.k_begin + (blocks[:, None] * block_size_k + within).flatten()
                mask[seq.batch, head, q_begin:q_end, keys[keys < seq.k_end]] = True
            row += 1
    return mask
