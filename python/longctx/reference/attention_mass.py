"""Naive twin of `longctx.attention_mass`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from longctx.reference._mask import sequences, visible_keys


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    segment_offsets: Tensor | None = None,
    reduce: str = "key",
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    num_sink_tokens: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_ranges: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax probability summed over all rows of `q`, float32; see `longctx.attention_mass`.

    `reduce="key"` gives [batch, num_q_heads, seqlen_k], or [.., num_segments] where segment `n` holds
    the keys `segment_offsets[n]:segment_offsets[n + 1]` of the key axis.
    `reduce="diagonal"` gives [batch, num_q_heads, seqlen_q + seqlen_k - 1]: key row `j` and query row
    `i` lie on diagonal `j - i + seqlen_q - 1`. Under the bottom-right alignment the query's own key
    (distance 0) is diagonal `seqlen_k - 1` (`seqused_k - 1` when given), and a key `d` tokens earlier
    lies on that diagonal minus `d`.
    Packed, with `i` and `j` counted from the start of sequence `s`, the diagonal is
    `cu_seqlens_q[s] + cu_seqlens_k[s] + j - i + q_len - 1`: sequences own disjoint ranges.
    `reduce="both"` gives the pair (by key, by diagonal).
    """
    if page_table is not None:
        raise NotImplementedError("longctx::attention_mass: `page_table` is not supported")
    batch, num_q_heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    mask = visible_keys(
        batch,
        seqlen_q,
        seqlen_k,
        causal=causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        num_sink_tokens=num_sink_tokens,
        key_ranges=key_ranges,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
    )[:, None].to(q.device)
    seen = mask.any(dim=2)[..., None]
    k64 = k.double().repeat_interleave(num_q_heads // k.shape[1], dim=1).masked_fill(~seen, 0.0)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = scale * (q.double() @ k64.transpose(2, 3))
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if lse is None:
        lse = torch.logsumexp(scores.masked_fill(~mask, -torch.inf), dim=-1)
    total = lse.double() if sinks is None else torch.logaddexp(lse.double(), sinks.double()[None, :, None])
    empty = (lse == -torch.inf)[..., None]
    probabilities = torch.exp(scores - total[..., None]).masked_fill(~mask | empty, 0.0)

    by_key = probabilities.sum(dim=2)
    if segment_offsets is not None:
        ends = segment_offsets.tolist()
        segments = [by_key[..., first:last].sum(dim=-1) for first, last in pairwise(ends)]
        by_key = torch.stack(segments, dim=-1) if segments else by_key[..., :0]
    by_diagonal = by_key.new_zeros(batch, num_q_heads, max(seqlen_q + seqlen_k - 1, 0))
    for seq in sequences(batch, seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k, seqused_k):
        for row in range(seq.q_begin, seq.q_end):
            first = seq.k_begin - row + seq.q_begin + seq.q_end - 1
            keys = probabilities[seq.batch, :, row, seq.k_begin : seq.k_end]
            by_diagonal[seq.batch, :, first : first + keys.shape[-1]] += keys
    if reduce == "both":
        return by_key.float(), by_diagonal.float()
    return (by_key if reduce == "key" else by_diagonal).float()
