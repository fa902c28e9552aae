"""attention_mass: the softmax probability that the query rows put on each key and diagonal."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op
from longctx.ops.attention import attention


# The overloads name only the argument that decides the type of the result.
@overload
def attention_mass(
    q: Tensor, k: Tensor, lse: Tensor | None = None, *, reduce: Literal["both"], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_mass(
    q: Tensor, k: Tensor, lse: Tensor | None = None, *, reduce: Literal["key", "diagonal"] = "key", **options: Any
) -> Tensor: ...
def attention_mass(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    segment_offsets: Tensor | None = None,
    reduce: Literal["key", "diagonal", "both"] = "key",
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Sums the probabilities of attention over the query rows, per key or per diagonal.

    `p[i, j] = exp(s[i, j] - lse[i])` where the predicate lets query `i` see key `j`, else 0; `s` and the
    predicate are those of `longctx.attention`. To estimate where a long prompt attends, pass its last
    queries: `attention_mass(q[:, :, -128:], k)`.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64 (CPU), bfloat16 or float16; any
            strides with a contiguous last dim.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`; `num_q_heads % num_kv_heads == 0`.
        lse: `[batch, num_q_heads, seqlen_q]`, float32 (float64 for float64): what `attention` returned for
            the same rows and options. Rows at -inf count nothing. `None` computes it, without values:
            cheaper than a call of `attention` for the sake of its lse.
        segment_offsets: int32 `[num_segments + 1]`, non-decreasing: sum over the keys
            `segment_offsets[n]:segment_offsets[n + 1]` of the key axis (of the packed axis when packed).
        reduce: `"key"` sums per key or segment. `"diagonal"` sums per diagonal: key row `j` and query row
            `i` lie on diagonal `j - i + seqlen_q - 1`, so a query's own position (bottom-right alignment)
            is diagonal `seqlen_k - 1` (`seqused_k - 1` when given) and a key `d` tokens earlier is `d`
            lower. Packed, with `i` and `j` counted from the start of sequence `s`, it is
            `cu_seqlens_q[s] + cu_seqlens_k[s] + j - i + len_q[s] - 1`: sequences own disjoint ranges.
            `"both"` returns both from one pass.
        causal, softmax_scale, window_size_left, window_size_right, num_sink_tokens, softcap, key_ranges,
            cu_seqlens_q, cu_seqlens_k, seqused_k, page_table: as in `longctx.attention`.
        sinks: float32 `[num_q_heads]`: a further logit that takes its share; `lse` does not hold it.
        validate: also check the values of index tensors (reads them).

    Returns:
        float32 `[batch, num_q_heads, seqlen_k]` (or `[.., num_segments]`), `[batch, num_q_heads, seqlen_q +
        seqlen_k - 1]` by diagonal, or the pair of them. Keys that no row sees have mass 0.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * head_dim` FLOPs per head and visible (query, key) pair, counted in tiles (twice without
    lse); memory beyond the outputs is bounded by tiles, plus up to 16 copies of a result by diagonal where
    there are few heads. Deterministic for every thread count: no atomics. Gradients: none yet (raises
    NotImplementedError).
    Source: the vertical-slash estimate of MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766);
    per segment, the relevance signal of BlockRank (arXiv 2510.05396).

    Example:
        >>> import torch, longctx
        >>> q, k = torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64)
        >>> by_key, by_diagonal = longctx.attention_mass(q[:, :, -100:], k, reduce="both")
        >>> by_key.shape, by_diagonal.shape, round(float(by_key[0, 0].sum()))
        (torch.Size([1, 2, 500]), torch.Size([1, 2, 599]), 100)
    """
    if validate:
        _validate.sequences("attention_mass", q, k, key_ranges, cu_seqlens_q, cu_seqlens_k, seqused_k)
        _validate.segments("attention_mass", "segment_offsets", segment_offsets, k.shape[2])
    if lse is None:
        narrow_values = k[..., :1]  # attention needs values; these lie in memory that k brings along
        _, lse = attention(
            q,
            k,
            narrow_values,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            num_sink_tokens=num_sink_tokens,
            softcap=softcap,
            key_ranges=key_ranges,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_k=seqused_k,
            page_table=page_table,
        )
    masses: tuple[Tensor, Tensor] = call(
        torch.ops.longctx.attention_mass,
        q,
        k,
        lse,
        segment_offsets,
        reduce,
        causal,
        softmax_scale,
        window_size_left,
        window_size_right,
        num_sink_tokens,
        softcap,
        sinks,
        key_ranges,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        page_table,
    )
    if reduce == "both":
        return masses
    by_key, by_diagonal = masses
    return by_diagonal if reduce == "diagonal" else by_key


def _fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segment_offsets: Tensor | None = None,
    reduce: str = "key",
    *options: object,
    **named_options: object,
) -> tuple[Tensor, Tensor]:
    num_keys = k.shape[2] if segment_offsets is None else segment_offsets.shape[0] - 1
    num_diagonals = torch.sym_max(q.shape[2] + k.shape[2] - 1, 0)
    return (
        q.new_empty((*q.shape[:2], 0 if reduce == "diagonal" else num_keys), dtype=torch.float32),
        q.new_empty((*q.shape[:2], 0 if reduce == "key" else num_diagonals), dtype=torch.float32),
    )


register_op("attention_mass", _fake)
