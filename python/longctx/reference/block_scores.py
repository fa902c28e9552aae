"""Naive twin of `longctx.block_scores`."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.reference._mask import sequences


def _means(rows: Tensor, block_size: int) -> Tensor:
    """[length, dim] -> [num_blocks, dim]; a short last block divides by its own length."""
    return torch.stack([block.mean(dim=0) for block in rows.split(block_size)])


def _row_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dim in which a row of -inf gives zeros."""
    return torch.softmax(logits, dim=-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)


def _antidiagonal(q: Tensor, k: Tensor, stride: int, offset: int, causal: bool) -> Tensor:
    """Mean score of the antidiagonal of every stride x stride square, -inf where nothing is seen.

    A short last group of queries or keys makes a rectangle: its last query meets its first key.
    """
    q_groups, k_groups = q.split(stride), k.split(stride)
    logits = q.new_full((len(q_groups), len(k_groups)), -torch.inf)
    for n, queries in enumerate(q_groups):
        last_position = offset + n * stride + len(queries) - 1
        for m, keys in enumerate(k_groups):
            if not causal or m * stride <= last_position:
                pairs = min(len(queries), len(keys))
                logits[n, m] = (queries.flip(0)[:pairs] * keys[:pairs]).sum() / pairs
    return logits


def _block_logits(
    q: Tensor, k: Tensor, block_size_q: int, block_size_k: int, method: str, offset: int, causal: bool
) -> Tensor:
    """`method` mean or max_mean: [num_q_blocks, num_k_blocks], -inf where nothing is seen."""
    first_key = torch.arange(0, len(k), block_size_k)
    if method == "mean":
        logits = _means(q, block_size_q) @ _means(k, block_size_k).T
        last_position = offset + torch.arange(1, len(logits) + 1) * block_size_q - 1
    else:
        logits = q @ _means(k, block_size_k).T
        last_position = offset + torch.arange(len(q))
    if causal:
        logits = logits.masked_fill(first_key > last_position[:, None], -torch.inf)
    if method == "max_mean":
        logits = torch.stack([rows.amax(dim=0) for rows in logits.split(block_size_q)])
    return logits


def block_scores(
    q: Tensor,
    k: Tensor,
    block_size_q: int = 128,
    block_size_k: int = 128,
    *,
    method: str = "mean",
    softmax: bool = True,
    causal: bool = True,
    softmax_scale: float | None = None,
    stride: int = 16,
    q_offset: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Float32 scores [batch, num_q_heads, num_q_blocks, num_k_blocks]; see `longctx.block_scores`.

    Packed, `num_q_blocks` is `ceil(seqlen_q / block_size_q) + num_seqs`: sequences own consecutive
    rows and the rows behind the last sequence are empty. `q_offset` is the key position of the first
    query row (counted from `seqused_k` if given); by default rows align bottom-right.
    """
    batch, num_q_heads, seqlen_q, head_dim = q.shape
    group_size = num_q_heads // k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    num_rows = -(-seqlen_q // block_size_q) + (0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1)
    shape = (batch, num_q_heads, num_rows, -(-k.shape[2] // block_size_k))
    result = torch.full(shape, 0.0 if softmax else -torch.inf, dtype=torch.float64)
    first_row = 0
    for seq in sequences(batch, seqlen_q, k.shape[2], cu_seqlens_q, cu_seqlens_k, seqused_k):
        first_row = 0 if cu_seqlens_q is None else first_row
        len_q, len_k = seq.q_end - seq.q_begin, seq.k_end - seq.k_begin
        num_q_blocks, num_k_blocks = -(-len_q // block_size_q), -(-len_k // block_size_k)
        rows = slice(first_row, first_row + num_q_blocks)
        first_row += num_q_blocks
        if len_q == 0 or len_k == 0:
            continue
        offset = len_k - len_q
        if q_offset is not None:
            offset = q_offset + (0 if seqused_k is None else len_k)
        for head in range(num_q_heads):
            q_rows = scale * q[seq.batch, head, seq.q_begin : seq.q_end].double()
            k_rows = k[seq.batch, head // group_size, seq.k_begin : seq.k_end].double()
            if method == "antidiagonal":
                logits = _antidiagonal(q_rows, k_rows, stride, offset, causal)
                blocks = torch.full((num_q_blocks, num_k_blocks), 0.0 if softmax else -torch.inf).double()
                values = _row_softmax(logits) if softmax else logits
                for i, q_groups in enumerate(range(0, len(logits), block_size_q // stride)):
                    for j, k_groups in enumerate(range(0, logits.shape[1], block_size_k // stride)):
                        square = (
                            slice(q_groups, q_groups + block_size_q // stride),
                            slice(k_groups, k_groups + block_size_k // stride),
                        )
                        seen = logits[square] > -torch.inf
                        if softmax:
                            groups_with_keys = (logits[square[0]] > -torch.inf).any(dim=1).sum()
                            blocks[i, j] = values[square].sum() / groups_with_keys.clamp(min=1)
                        elif seen.any():
                            blocks[i, j] = values[square][seen].mean()
            else:
                blocks = _block_logits(q_rows, k_rows, block_size_q, block_size_k, method, offset, causal)
                blocks = _row_softmax(blocks) if softmax else blocks
            result[seq.batch, head, rows, :num_k_blocks] = blocks
    return result.float().to(q.device)
