"""attention: softmax attention over the keys that the predicate lets a query see."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op


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
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with causal, window, sink and key-range masks; only visible tiles cost anything.

    `out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j]` over the visible keys `j`. A key is
    visible iff it is in `key_ranges` (if given), passes `causal`, and is inside the window or among the
    first `num_sink_tokens` keys. Query `i` stands at key position `i + seqlen_k - seqlen_q`
    (bottom-right alignment).

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64 (CPU), bfloat16 or float16.
            Any strides with a contiguous last dim: a `[batch, seqlen, heads, dim]` tensor passes as
            `.transpose(1, 2)` without a copy. The same holds for k and v.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`; `num_q_heads % num_kv_heads == 0`, query head
            `h` reads kv head `h // (num_q_heads // num_kv_heads)`.
        v: `[batch, num_kv_heads, seqlen_k, head_dim_v]`.
        causal: query `i` sees keys up to its own position.
        softmax_scale: factor on `q . k`; `None` means `head_dim ** -0.5`.
        window_size_left: sees itself and this many earlier keys; -1 is open. The `sliding_window = W` of
            transformers is `W - 1` here.
        window_size_right: sees this many later keys; -1 is open.
        num_sink_tokens: this many first keys stay visible outside the window.
        softcap: `> 0` turns the scaled score `s` into `softcap * tanh(s / softcap)`, before masking.
        sinks: float32 `[num_q_heads]`; one more logit per row that has no value.
        key_ranges: int32 `[batch, R, seqlen_q, 2]`, `R` 1 or 2: per query row the union of `R` half-open
            ranges of key positions (of the packed axis when packed). Empty or reversed ranges add nothing.
        cu_seqlens_q, cu_seqlens_k: int32 `[num_seqs + 1]`: sequences packed along the seqlen axis
            (`batch == 1`); empty sequences are legal. Both or neither.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist; alignment uses it as seqlen_k.
        page_table: reserved for paged KV; must be None.
        validate: also check the values of index tensors (reads them). Without it, bad values are
            clamped or skipped and never address memory outside the tensors.

    Returns:
        `out [batch, num_q_heads, seqlen_q, head_dim_v]` in q's dtype, and `lse [batch, num_q_heads,
        seqlen_q]`, natural log, float32 (float64 for float64), without `sinks`. A row that sees no key
        gives `out = 0`, `lse = -inf`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * (head_dim + head_dim_v)` FLOPs per head and visible (query, key) pair, counted in tiles;
    memory beyond the outputs is bounded by tiles. Deterministic for a fixed thread count. Gradients: none
    yet (raises NotImplementedError).
    Source: Dao et al., "FlashAttention" (arXiv 2205.14135); sinks: Xiao et al., "StreamingLLM"
    (arXiv 2309.17453).

    Example:
        >>> import torch, longctx
        >>> q = torch.randn(1, 8, 100, 64)
        >>> k = v = torch.randn(1, 2, 100, 64)  # grouped-query attention: 4 query heads a kv head
        >>> out, lse = longctx.attention(q, k, v, window_size_left=15, num_sink_tokens=4)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 100, 64]), torch.Size([1, 8, 100]))
    """
    if validate:
        _validate.sequences("attention", q, k, key_ranges, cu_seqlens_q, cu_seqlens_k, seqused_k)
    result: tuple[Tensor, Tensor] = call(
        torch.ops.longctx.attention,
        q,
        k,
        v,
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


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised `(out, lse)` of an attention op."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


register_op("attention", _fake)
