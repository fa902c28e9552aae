"""truncate_kv: keeps the accepted tokens of the draft at the end of caches, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._kv_rows import layers, list_ends, refuse_gradients
from longctx.ops._register import register_op


def truncate_kv(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor],
    seqused_k: Tensor,
    num_draft_tokens: int,
    *,
    accepted: Tensor | None = None,
    counts: Tensor | None = None,
    page_table: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Keeps the accepted ones of the last `num_draft_tokens` tokens of each batch entry, and returns the new lengths.

    Token `j` of the draft is key `seqused_k - num_draft_tokens + j`. What stays depends on what is given:

    - neither `accepted` nor `counts`: nothing; the last `num_draft_tokens` tokens are dropped.
    - `counts`: the first `counts` tokens of a chain.
    - `accepted`: the listed tokens of a tree, a path from its root, moved together behind the keys before the draft. A
      token whose depth in the tree is `d` then stands at the `d`-th place, which is where its position was counted
      from.

    Without `accepted` no row moves. Rows behind the new length keep whatever they hold. Entries of `accepted` that are
    -1, outside the draft or not ascending are left out.

    Args:
        k_cache: `[batch, num_kv_heads, seqlen_k, head_dim]`, float32, float64, bfloat16 or float16; any strides
            with a contiguous last dim. With `page_table`: `[num_pages, num_kv_heads, page_size, head_dim]`. Or a
            sequence of such tensors of one shape, the layers of a model. **Changed in place.**
        v_cache: `[batch, num_kv_heads, seqlen_k, head_dim_v]`, or in pages, and as many layers as `k_cache`.
            **Changed in place.**
        seqused_k: int32 `[batch]`: the number of keys, the draft included. Not changed.
        num_draft_tokens: from 0 to what the caches have room for. Of a draft longer than `seqused_k`, the tokens at
            negative keys do not exist.
        accepted: int32 `[batch, num_entries]`: tokens of the draft, ascending.
        counts: int32 `[batch]`: how many entries of `accepted`, or tokens of the draft, count. `None`: all of
            `accepted`.
        page_table: int32 `[batch, max_pages]`: key `j` is row `j % page_size` of page `page_table[b, j // page_size]`.
            No page that changes may belong to two batch entries.
        validate: also check that counts, accepted, seqused_k and page_table lie in range and that accepted ascends
            (reads them).

    Returns:
        int32 `[batch]`: the new `seqused_k`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given, and no cache
            has changed.
        NotImplementedError: a cache requires a gradient.

    Cost: no arithmetic; each row that moves is read and written once. Nothing is copied to the host: lengths and
    acceptance may come from the device. Deterministic.
    Gradients: none (raises NotImplementedError).
    Source: the verification of speculative drafts: RAPID (arXiv 2502.20330), tree drafts as in ADED (2407.12021).

    Example:
        >>> import torch, longctx
        >>> k, v = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 24)
        >>> used = torch.tensor([90], dtype=torch.int32)  # the last 8 of them a draft
        >>> longctx.truncate_kv(k, v, used, 8, counts=torch.tensor([3], dtype=torch.int32))
        tensor([85], dtype=torch.int32)
        >>> third = k[0, :, 88].clone()
        >>> longctx.truncate_kv(k, v, used, 8, accepted=torch.tensor([[0, 2, 6]], dtype=torch.int32))
        tensor([85], dtype=torch.int32)
        >>> torch.equal(k[0, :, 84], third)
        True
    """
    k_layers, v_layers = layers(k_cache), layers(v_cache)
    if validate and k_layers:
        list_ends("truncate_kv", k_layers[0], seqused_k.shape[0], seqused_k, page_table)
        if accepted is None:
            _validate.counts("truncate_kv", "counts", counts, num_draft_tokens)
        else:
            ends = torch.full_like(seqused_k, num_draft_tokens)
            _validate.key_lists("truncate_kv", "accepted", accepted, counts, ends, ascending=True)
    refuse_gradients("truncate_kv", [*k_layers, *v_layers])
    lengths: Tensor = torch.ops.longctx.truncate_kv(
        k_layers, v_layers, seqused_k, num_draft_tokens, accepted, counts, page_table
    )
    return lengths


def _fake(k_cache: list[Tensor], v_cache: list[Tensor], seqused_k: Tensor, *options: object) -> Tensor:
    return seqused_k.new_empty(seqused_k.shape)


register_op("truncate_kv", _fake, differentiable=False)
