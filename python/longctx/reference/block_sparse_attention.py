"""Naive twin of `longctx.block_sparse_attention`."""

from __future__ import annotations

from torch import Tensor

from longctx.reference._mask import listed_keys, visible_keys
from longctx.reference.attention import masked_attention


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indptr: Tensor,
    block_indices: Tensor,
    block_size_q: int,
    block_size_k: int,
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
    """`(out, lse)` over the listed blocks; see `longctx.block_sparse_attention`."""
    if page_table is not None:
        raise ValueError("longctx::block_sparse_attention: `page_table` must be None; got a tensor")
    listed = listed_keys(
        block_indptr,
        block_indices,
        block_size_q,
        block_size_k,
        batch=q.shape[0],
        num_q_heads=q.shape[1],
        seqlen_q=q.shape[2],
        seqlen_k=k.shape[2],
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
    )
    visible = visible_keys(
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
    return masked_attention(
        q, k, v, listed & visible[:, None], softmax_scale=softmax_scale, softcap=softcap, sinks=sinks
    )
