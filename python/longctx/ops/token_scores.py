"""token_scores: a score for each key, or for each of some candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op
from longctx.ops.page_scores import HeadReduce, QueryReduce, empty_scores


def token_scores(
    q: Tensor,
    k: Tensor,
    *,
    head_reduce: HeadReduce = "none",
    query_reduce: QueryReduce = "none",
    candidates: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """`softmax_scale * q . k` of each query token and key: the logits of attention, reduced while they are in cache.

    Token `i` stands at key position `p = seqlen_k - seqlen_q + i`, as in `gather_attention`; keys after `p` score -inf.
    Scores are reduced over heads, then over tokens: `query_reduce` joins the tokens that see the key, and a key that
    none sees scores -inf.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64, bfloat16 or float16. Any strides with a
            contiguous last dim, as for k.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`; `num_q_heads % num_kv_heads == 0`.
        head_reduce: `"group_mean"`, `"group_max"`, `"group_sum"` over the query heads of a kv head; `"all_sum"` over
            all query heads; `"none"`.
        query_reduce: `"mean"` or `"max"` over query tokens; `"none"`.
        candidates: int32 `[batch, heads, seqlen_q or 1, num_candidates]`, heads 1, `num_kv_heads` or `num_q_heads`:
            only these keys are scored, in this order; others than keys that exist score -inf. What is reduced together
            must share its candidates.
        softmax_scale: factor on `q . k`; `None` means `head_dim ** -0.5`.
        softcap: `> 0` turns the scaled score `s` into `softcap * tanh(s / softcap)`, before it is reduced.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist; positions use it as seqlen_k.
        page_table: int32 `[batch, max_pages]`: k is then `[num_pages, num_kv_heads, page_size, head_dim]`, as in
            `gather_attention`. Needs `seqused_k`. Keys of pages that do not exist score -inf.
        validate: also check the values of candidates, seqused_k and page_table (reads them).

    Returns:
        float32 `[batch, num_q_heads | num_kv_heads | 1, seqlen_q | 1, seqlen_k | num_candidates]`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * head_dim` FLOPs per query row and key; a key is read once for all query heads that share it: bound by
    memory for a few query rows. Deterministic: the same bits on any number of threads. On CUDA one launch
    or two, as `page_scores`. Gradients: none yet (raises NotImplementedError).
    Source: TidalDecode (arXiv 2410.05076) scores all keys in a few layers; HiP (arXiv 2406.09827) probes candidates.

    Example:
        >>> import torch, longctx
        >>> q, k = torch.randn(1, 8, 2, 64), torch.randn(1, 2, 1000, 64)
        >>> scores = longctx.token_scores(q, k, head_reduce="group_mean")
        >>> scores.shape, scores[0, 0, 0, -2:].isinf()
        (torch.Size([1, 2, 2, 1000]), tensor([False,  True]))
        >>> candidates = torch.tensor([3, 999, 7], dtype=torch.int32).expand(1, 1, 1, 3)
        >>> longctx.token_scores(q, k, query_reduce="max", candidates=candidates).shape
        torch.Size([1, 8, 1, 3])
    """
    if validate:
        seqlen_k = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
        _validate.lengths("token_scores", "seqused_k", seqused_k, seqlen_k)
        _validate.pages("token_scores", page_table, seqused_k, k)
        if candidates is not None:
            _validate.candidates("token_scores", candidates, seqlen_k)
    result: Tensor = call(
        torch.ops.longctx.token_scores,
        q,
        k,
        head_reduce,
        query_reduce,
        candidates,
        softmax_scale,
        softcap,
        seqused_k,
        page_table,
    )
    return result


def _fake(
    q: Tensor,
    k: Tensor,
    head_reduce: str = "none",
    query_reduce: str = "none",
    candidates: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    seqlen_k = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
    num_scores = seqlen_k if candidates is None else candidates.shape[3]
    return empty_scores(q, k.shape[1], head_reduce, query_reduce, num_scores)


register_op("token_scores", _fake)
