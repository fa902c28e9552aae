"""select_blocks: scores of key blocks -> which of them each query block visits, as a block list."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op


def select_blocks(
    scores: Tensor,
    *,
    method: Literal["top_k", "cumulative", "threshold", "relative"] = "top_k",
    value: float | Tensor,
    scope: Literal["row", "head"] = "row",
    num_first: int = 0,
    num_local: int = 0,
    causal: bool = True,
    block_size_q: int = 128,
    block_size_k: int = 128,
    q_offset: int = 0,
    max_blocks_per_row: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Picks key blocks by score and returns the block list that `block_sparse_attention` takes.

    Row `i` may list key blocks `0 .. (q_offset + (i + 1) * block_size_q - 1) // block_size_k` (all, when
    not causal). Of these, the forced ones are always listed: the first `num_first` and the last
    `num_local`. The others compete in the order (score descending, index ascending):

    - `top_k`: the best `value` of them (forced blocks do not count against it).
    - `threshold`: those with `score >= value`.
    - `relative`: those with `score >= value * (highest visible score)`, the product in float32.
    - `cumulative`: the smallest prefix of the order whose mass, forced blocks included, reaches `value`
      times the visible mass; the crossing block is kept. The mass of a score is the integer
      `floor(ldexp(score, 40 - e))`, `e` the exponent of the highest visible score, so that every device
      cuts at the same block; scores should not be negative (a negative one has no mass). Cuts over
      `n >= 2**21` entries use `61 - bit_length(n)` in place of 40, so that the sum cannot overflow.

    NaN counts as -inf, and a block at -inf is listed only if forced: mask blocks out with -inf.

    Args:
        scores: float32 `[batch, heads, num_q_blocks, num_k_blocks]`, last dim contiguous; `block_scores`
            makes them.
        method: see above.
        value: a number, or one per head: a floating-point tensor `[heads]`. Rounded to float32.
        scope: `"row"` cuts every row by itself; `"head"` makes one cut over the whole map of a head (of
            each sequence), entries ordered by row and then block.
        num_first, num_local: numbers of forced blocks at the start and at the end of the visible ones.
        causal: rows see blocks up to their last query's; otherwise all blocks.
        block_size_q: queries per block: 16, 32, 64 or 128.
        block_size_k: keys per block: 1, 8, 16, 32, 64 or 128.
        q_offset: key position of the first query row, `seqlen_k - seqlen_q` under the bottom-right
            alignment. With `seqused_k` it is counted from there: pass `-seqlen_q`. Row slabs of a long
            map are built one by one through it. Must stay 0 for packed sequences.
        max_blocks_per_row: of a row with more blocks, forced ones and then the best-scored stay.
            Must leave room for `num_first + num_local`.
        cu_seqlens_q, cu_seqlens_k: int32 `[num_seqs + 1]`, packed sequences (`batch == 1`), aligned
            bottom-right each. Sequence `s` owns the next `ceil(len_s / block_size_q)` rows of `scores`, and
            its columns count from its own first key, as `block_scores` lays them out.
        seqused_k: int32 `[batch]`: only the first `ceil(seqused_k / block_size_k)` blocks exist.
        validate: also check the values of index tensors (reads them).

    Returns:
        `block_indptr` int64 `[batch, heads, num_q_blocks + 1]`, absolute offsets, and `block_indices` int32
        `[batch * heads * num_q_blocks * min(max_blocks_per_row, num_k_blocks)]`: ascending in each row, -1
        behind the last row. The size follows from shapes alone, so nothing is read back.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: a radix descent reads the visible scores a fixed number of times (at most 8): linear in their
    number, no sort; scratch of 16 bytes per row. Deterministic, and the same list on every device.
    Gradients: the result is integer and has none.
    Source: the selection rules of FlexPrefill (arXiv 2502.20766), XAttention (arXiv 2503.16428) and
    MInference (arXiv 2407.02490).

    Example:
        >>> import torch, longctx
        >>> q, k, v = (torch.randn(1, 2, 512, 64) for _ in range(3))
        >>> scores = longctx.block_scores(q, k)
        >>> blocks = longctx.select_blocks(scores, method="cumulative", value=0.9, num_first=1, num_local=1)
        >>> out, lse = longctx.block_sparse_attention(q, k, v, *blocks, 128, 128)
    """
    if validate:
        _validate.offsets("select_blocks", "cu_seqlens_q", cu_seqlens_q, None)
        _validate.offsets("select_blocks", "cu_seqlens_k", cu_seqlens_k, None)
        _validate.lengths("select_blocks", "seqused_k", seqused_k, scores.shape[3] * block_size_k)
    head_values = None
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"longctx::select_blocks: `value` must be real; got {value.dtype}")
        if value.shape != scores.shape[1:2]:
            raise ValueError(
                f"longctx::select_blocks: `value` must have shape [heads] = {list(scores.shape[1:2])}; "
                f"got {list(value.shape)}"
            )
        if value.device != scores.device:
            raise ValueError(f"longctx::select_blocks: `value` must be on {scores.device}; got {value.device}")
        head_values, value = value.to(torch.float32).contiguous(), 0.0
    blocks: tuple[Tensor, Tensor] = call(
        torch.ops.longctx.select_blocks,
        scores,
        method,
        float(value),
        head_values,
        scope,
        num_first,
        num_local,
        causal,
        block_size_q,
        block_size_k,
        q_offset,
        max_blocks_per_row,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
    )
    return blocks


def _fake(
    scores: Tensor,
    method: str = "top_k",
    value: float = 0.0,
    head_values: Tensor | None = None,
    scope: str = "row",
    num_first: int = 0,
    num_local: int = 0,
    causal: bool = True,
    block_size_q: int = 128,
    block_size_k: int = 128,
    q_offset: int = 0,
    max_blocks_per_row: int | None = None,
    *sequences: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, num_rows, num_k_blocks = scores.shape
    limit = num_k_blocks if max_blocks_per_row is None else torch.sym_min(max_blocks_per_row, num_k_blocks)
    indptr = scores.new_empty((batch, heads, num_rows + 1), dtype=torch.int64)
    return indptr, scores.new_empty((batch * heads * num_rows * limit,), dtype=torch.int32)


register_op("select_blocks", _fake)
