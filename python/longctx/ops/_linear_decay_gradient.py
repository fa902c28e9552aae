"""The gradient of the decays of a causal sweep.

The decay at token `t` weighs what crosses from before `t` to `t` and on: with `S_t` the state after `t`, forwards, and
`R_t` the state before `t` of the other factors, backwards, its gradient is `<R_t, S_{t-1}>`. One token earlier it
differs by `q_t . dq_t - k_t . dk_t`. States are needed at the ends of chunks only, and nothing is a difference over
more than a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops._call import call
from longctx.ops._linear import CHUNK_SIZE

Factors = tuple[Tensor, Tensor, Tensor | None]  # of a state: keys, values and where it starts


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, in the wider dtype of the two."""
    return (a * b).sum(-1)


def decay_gradient(
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    forwards: Factors,
    backwards: Factors,
    crossing: Tensor,
) -> Tensor:
    """The gradient of a `log_decay` per head or per token.

    `forwards` makes `S`, `backwards` makes `R`; `scale` is what their products count. `crossing` `[batch, num_heads,
    seqlen]` is what every token adds to the gradients of decays up to its own.
    """
    keys, values, start = forwards
    states = call(torch.ops.longctx.linear_attention_states, keys, values, log_decay, start, cu_seqlens, False, False)
    keys, values, end = backwards
    gradients = call(torch.ops.longctx.linear_attention_states, keys, values, log_decay, end, cu_seqlens, False, True)
    # Between two chunks: the state there and its gradient.
    between = (states[:, :, :-1] * gradients[:, :, 1:]).sum((3, 4))
    if cu_seqlens is None:
        per_token = _of_whole(crossing, scale, states, gradients, between, start, end)
    else:
        per_token = _of_packed(crossing, scale, states, gradients, between, start, end, cu_seqlens)
    return per_token if log_decay.dim() == 3 else per_token.sum((0, 2))


def _in_chunk(crossing: Tensor, before: Tensor, behind: Tensor) -> Tensor:
    """Sums over the tokens from each on, in its chunk [.., CHUNK_SIZE], and what comes from behind the chunk.

    All of a chunk adds up to what stands before it but for rounding errors, which grow with the number of terms: spread
    over the chunk, they are half as large.
    """
    sums = crossing.flip(-1).cumsum(-1).flip(-1)
    missing = before - behind - sums[..., 0]
    share = 1.0 - torch.arange(CHUNK_SIZE, device=sums.device, dtype=sums.dtype) / CHUNK_SIZE
    return sums + behind[..., None] + missing[..., None] * share


def _of_whole(
    crossing: Tensor,
    scale: float,
    states: Tensor,
    gradients: Tensor,
    between: Tensor,
    start: Tensor | None,
    end: Tensor | None,
) -> Tensor:
    seqlen, num_chunks = crossing.shape[2], states.shape[2]
    if num_chunks == 0:
        return crossing
    none = between.new_zeros(between.shape[:2])
    first = none if start is None else (start * gradients[:, :, 0]).sum((2, 3))
    last = none if end is None else (states[:, :, -1] * end).sum((2, 3))
    edges = scale * torch.cat([first[..., None], between, last[..., None]], dim=2)
    padded = F.pad(crossing, (0, num_chunks * CHUNK_SIZE - seqlen)).unflatten(2, (num_chunks, CHUNK_SIZE))
    return _in_chunk(padded, edges[:, :, :-1], edges[:, :, 1:]).flatten(2)[:, :, :seqlen]


def _of_packed(
    crossing: Tensor,
    scale: float,
    states: Tensor,
    gradients: Tensor,
    between: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """The chunks of a sequence follow those of the one before; offsets are read on the device only."""
    seqlen, num_chunks, num_seqs = crossing.shape[2], states.shape[2], cu_seqlens.shape[0] - 1
    if num_seqs == 0:
        return torch.zeros_like(crossing)
    first_token = cu_seqlens[:-1].long().clamp(0, seqlen)
    end_token = torch.maximum(cu_seqlens[1:].long().clamp(0, seqlen), first_token)
    chunks = (end_token - first_token + CHUNK_SIZE - 1) // CHUNK_SIZE
    end_chunk = chunks.cumsum(0)

    def at_edges(edges: Tensor, chunk: Tensor, given: Tensor | None, found: Tensor) -> Tensor:
        """`edges` of chunks, where at the edge of a sequence the other one's state does not count, but the given."""
        products = edges.new_zeros((*edges.shape[:2], num_seqs))
        if given is not None:
            own = found.index_select(2, chunk.clamp(max=num_chunks - 1))
            products = (own * given.transpose(0, 1)).sum((3, 4))
        # One slot more takes what belongs to an empty sequence.
        chunk = torch.where(chunks > 0, chunk, num_chunks).clamp(max=num_chunks)
        return scale * F.pad(edges, (0, 1)).index_copy(2, chunk, products)[:, :, :num_chunks]

    before = at_edges(F.pad(between, (1, 0)), end_chunk - chunks, start, gradients)
    behind = at_edges(F.pad(between, (0, 1)), (end_chunk - 1).clamp(min=0), end, states)

    token = torch.arange(seqlen, device=crossing.device)
    sequence = torch.bucketize(token, end_token, right=True).clamp(max=num_seqs - 1)
    owned = (token >= first_token[sequence]) & (token < end_token[sequence])
    slot = ((end_chunk - chunks) * CHUNK_SIZE - first_token)[sequence] + token
    slot = torch.where(owned, slot, num_chunks * CHUNK_SIZE).clamp(max=num_chunks * CHUNK_SIZE)
    padded = crossing.new_zeros((*crossing.shape[:2], num_chunks * CHUNK_SIZE + 1))
    padded = padded.index_copy(2, slot, crossing * owned)[:, :, :-1].unflatten(2, (num_chunks, CHUNK_SIZE))
    result = F.pad(_in_chunk(padded, before, behind).flatten(2), (0, 1))
    return result.index_select(2, slot) * owned
