"""block_scores: an estimate of how much attention each query block pays to each key block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op


def block_scores(
    q: Tensor,
    k: Tensor,
    block_size_q: int = 128,
    block_size_k: int = 128,
    *,
    method: Literal["mean", "max_mean", "antidiagonal"] = "mean",
    softmax: bool = True,
    causal: bool = True,
    softmax_scale: float | None = None,
    stride: int = 16,
    q_offset: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Scores every pair of a query block and a key block far below the cost of attention.

    - `mean`: `softmax_scale * mean(q block) . mean(k block)` (FlexPrefill, MInference).
    - `max_mean`: the maximum over the block's queries that see the key block's first key of
      `softmax_scale * q . mean(k block)`; the means are rounded to q's dtype (FlashPrefill).
    - `antidiagonal`: `stride` queries and `stride` keys form a square whose score is `softmax_scale` times
      the mean of `q . k` over its antidiagonal; a block's score is taken over its squares (XAttention). A
      short last group of queries or keys makes a rectangle: its last query meets its first key.

    With `softmax` the rows of the first two are softmaxes over the visible blocks; `antidiagonal` takes
    the softmax over squares, sums it per block and averages it over the row's groups of queries. Either
    way a row sums to 1, and what it may not see is 0. Without `softmax` the scores are logits (the mean
    over visible squares, for `antidiagonal`) and what a row may not see is -inf. A short last block is
    averaged over its own length. Visible are, with `causal`, the key blocks that start at or before the
    row's last query position, `first + (i + 1) * block_size_q - 1`, and the squares likewise.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64 (CPU), bfloat16 or float16; any
            strides with a contiguous last dim.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`; `num_q_heads % num_kv_heads == 0`.
        block_size_q: queries per block: 16, 32, 64 or 128.
        block_size_k: keys per block: 1, 8, 16, 32, 64 or 128.
        method, softmax, causal: see above.
        softmax_scale: factor on `q . k`; `None` means `head_dim ** -0.5`.
        stride: edge of an `antidiagonal` square; divides both block sizes.
        q_offset: key position of the first query row, counted from `seqused_k` if that is given; `None` is
            the bottom-right alignment, `seqlen_k - seqlen_q` (`-seqlen_q`). A long map is made in row
            slabs by slicing q: `block_scores(q[:, :, a:b], k, q_offset=seqlen_k - seqlen_q + a)`, `a` a
            multiple of block_size_q. Must stay `None` for packed sequences.
        cu_seqlens_q, cu_seqlens_k: int32 `[num_seqs + 1]`: packed sequences (`batch == 1`). Sequence `s` owns
            the next `ceil(len_s / block_size_q)` rows; its key blocks count from its own first key.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist.
        validate: also check the values of index tensors (reads them).

    Returns:
        float32 `[batch, num_q_heads, num_q_blocks, num_k_blocks]` with `num_q_blocks = ceil(seqlen_q /
        block_size_q)`, plus `num_seqs` when packed, and `num_k_blocks = ceil(seqlen_k / block_size_k)`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `mean` reads q and k once and multiplies means: memory-bound. `max_mean` takes
    `1 / block_size_k` and `antidiagonal` `1 / stride` of the FLOPs of `q k^T`. Deterministic. Gradients:
    none yet (raises NotImplementedError).
    Source: FlexPrefill (arXiv 2502.20766), XAttention (arXiv 2503.16428), MInference (arXiv 2407.02490).

    Example:
        >>> import torch, longctx
        >>> q, k = torch.randn(1, 8, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> scores = longctx.block_scores(q, k, method="antidiagonal", stride=8)
        >>> scores.shape, bool((scores.sum(-1) - 1).abs().max() < 1e-5)
        (torch.Size([1, 8, 8, 8]), True)
    """
    if validate:
        _validate.sequences("block_scores", q, k, None, cu_seqlens_q, cu_seqlens_k, seqused_k)
    scores: Tensor = call(
        torch.ops.longctx.block_scores,
        q,
        k,
        block_size_q,
        block_size_k,
        method,
        softmax,
        causal,
        softmax_scale,
        stride,
        q_offset,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
    )
    return scores


def _fake(
    q: Tensor,
    k: Tensor,
    block_size_q: int = 128,
    block_size_k: int = 128,
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
    num_q_blocks = (q.shape[2] + block_size_q - 1) // block_size_q
    if cu_seqlens_q is not None:
        num_q_blocks = num_q_blocks + cu_seqlens_q.shape[0] - 1
    num_k_blocks = (k.shape[2] + block_size_k - 1) // block_size_k
    return q.new_empty((q.shape[0], q.shape[1], num_q_blocks, num_k_blocks), dtype=torch.float32)


register_op("block_scores", _fake)
