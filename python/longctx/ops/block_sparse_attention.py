"""block_sparse_attention: attention over the key blocks that a list names for each query block."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op
from longctx.ops.attention import empty_outputs


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
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention where query block `i` visits only the key blocks listed for it.

    A key counts iff its block is listed *and* the predicate (`causal`, windows, `num_sink_tokens`,
    `key_ranges`: see `longctx.attention`) lets the query see it; the predicate never adds a block.

    Args:
        q, k, v: as in `longctx.attention`.
        block_indptr: int64 `[batch or 1, heads, num_q_blocks + 1]`, contiguous, absolute offsets into
            `block_indices`; `heads` is 1, num_kv_heads or num_q_heads. `num_q_blocks` is
            `ceil(seqlen_q / block_size_q)`; packed, `ceil(total_q / block_size_q) + num_seqs`, where
            sequence `s` owns the next `ceil(len_s / block_size_q)` rows.
        block_indices: int32 `[capacity]`; row `(b, h, i)` is `block_indices[indptr[i]:indptr[i + 1]]`,
            ascending key blocks without duplicates (packed: counted from the sequence's first key).
            Entries behind the last row are never read.
        block_size_q: queries per block: 16, 32, 64 or 128.
        block_size_k: keys per block: 1, 8, 16, 32, 64 or 128.
        causal, softmax_scale, window_size_left, window_size_right, num_sink_tokens, softcap, sinks,
            key_ranges, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table: as in `longctx.attention`.
        validate: also check the values of the list and of index tensors (reads them). Without it, an
            entry that is not a block of its sequence, or not larger than the one before, is skipped.

    Returns:
        `(out, lse)` as in `longctx.attention`; lse counts the visited keys only.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * (head_dim + head_dim_v)` FLOPs per head and (query, key) pair of a listed, visible tile;
    memory beyond the outputs is bounded by tiles. Deterministic for a fixed thread count. Gradients: none
    yet (raises NotImplementedError).
    Source: Guo et al., "Block-Sparse Attention" (2024); Dao et al., "FlashAttention" (arXiv 2205.14135).

    Example:
        >>> import torch, longctx
        >>> q, k, v = (torch.randn(1, 2, 256, 64) for _ in range(3))
        >>> indptr = torch.tensor([[[0, 1, 3]]])                # two query blocks of 128
        >>> indices = torch.tensor([0, 0, 1], dtype=torch.int32)  # the second visits both key blocks
        >>> out, lse = longctx.block_sparse_attention(q, k, v, indptr, indices, 128, 128)
        >>> torch.allclose(out, longctx.attention(q, k, v)[0], atol=1e-5)
        True
    """
    if validate:
        op = "block_sparse_attention"
        _validate.sequences(op, q, k, key_ranges, cu_seqlens_q, cu_seqlens_k, seqused_k)
        _validate.block_list(op, block_indptr, block_indices, -(-k.shape[2] // block_size_k))
    result: tuple[Tensor, Tensor] = call(
        torch.ops.longctx.block_sparse_attention,
        q,
        k,
        v,
        block_indptr,
        block_indices,
        block_size_q,
        block_size_k,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        num_sink_tokens=num_sink_tokens,
        softcap=softcap,
        sinks=sinks,
        key_ranges=key_ranges,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        page_table=page_table,
    )
    return result


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indptr: Tensor,
    block_indices: Tensor,
    block_size_q: int,
    block_size_k: int,
    *options: object,
) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


register_op("block_sparse_attention", _fake)
