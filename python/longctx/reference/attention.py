"""Naive twin of `longctx.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.reference._mask import visible_keys


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    softmax_scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention under a boolean `mask`, broadcast to [batch, num_q_heads, seqlen_q, seqlen_k] like `bias`."""
    group_size = q.shape[1] // k.shape[1]
    mask = mask.to(q.device).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    # Keys that no row sees may hold anything, and 0 * NaN is NaN.
    seen = mask.any(dim=2)[..., None]
    k64 = k.double().repeat_interleave(group_size, dim=1).masked_fill(~seen, 0.0)
    v64 = v.double().repeat_interleave(group_size, dim=1).masked_fill(~seen, 0.0)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    scores = scale * (q.double() @ k64.transpose(2, 3))
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(q.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[None, :, None])
    probabilities = torch.exp(scores - total[..., None]).masked_fill(~mask, 0.0)
    out = (probabilities @ v64).to(v.dtype)
    return out, lse if q.dtype == torch.float64 else lse.float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` with the whole score matrix in memory; see `longctx.attention`."""
    if page_table is not None:
        raise ValueError("longctx::attention: `page_table` must be None; got a tensor")
    mask = visible_keys(
        q.shape[0],
        q.shape[2],
        k.shape[2],
        causal=causal,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        num_sink_tokens=num_sink_tokens,
        key_ranges=key_ranges,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
    )
    return masked_attention(q, k, v, mask[:, None], softmax_scale=softmax_scale, softcap=softcap, sinks=sinks)
