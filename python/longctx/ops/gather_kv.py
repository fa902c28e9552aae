"""gather_kv: copies the rows of k and v at the listed keys."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._kv_rows import list_ends
from longctx.ops._register import register_op


def gather_kv(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Copies rows of K and V out of a cache: `k_out[b, h, i] = k[b, h, indices[b, h, i]]`, and the same of v.

    Entries past `counts`, -1 and keys that do not exist give rows of zeros. For a set that outlives a step, such as the
    cache of Recycled Attention, or one that leaves the device; attention over a set that is used once is cheaper in
    place (`longctx.gather_attention`).

    Args:
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`, float32, float64, bfloat16 or float16; any strides with a
            contiguous last dim. With `page_table`: `[num_pages, num_kv_heads, page_size, head_dim]`.
        v: `[batch, num_kv_heads, seqlen_k, head_dim_v]`, or in pages as `k`.
        indices: int32 `[batch, heads, num_entries]`, in any order, with 1 or `num_kv_heads` heads. One head is a list
            for all of them.
        counts: int32 `[batch, heads]`: how many entries of each list count. `None`: all.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist. Needed with `page_table`.
        page_table: int32 `[batch, max_pages]`: key `j` is row `j % page_size` of page `page_table[b, j // page_size]`.
        validate: also check that counts, indices, seqused_k and page_table lie in range (reads them).

    Returns:
        `k_out [batch, num_kv_heads, num_entries, head_dim]` and `v_out [.., head_dim_v]`, contiguous.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: no arithmetic; each row is read and written once. Deterministic.
    Gradients: none yet (the backward raises NotImplementedError).
    Source: the recycled cache of Recycled Attention (arXiv 2411.05787) and the key-value fetch of InfLLM (2402.04617).

    Example:
        >>> import torch, longctx
        >>> k, v = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 24)
        >>> indices, counts = longctx.topk_select(k.norm(dim=-1), 10)
        >>> k_out, v_out = longctx.gather_kv(k, v, indices, counts)
        >>> torch.equal(v_out[0, 1, 3], v[0, 1, indices[0, 1, 3]])
        True
    """
    if validate:
        ends = list_ends("gather_kv", k, indices.shape[0], seqused_k, page_table)
        _validate.key_lists("gather_kv", "indices", indices, counts, ends[:, None], ascending=False)
    result: tuple[Tensor, Tensor] = call(torch.ops.longctx.gather_kv, k, v, indices, counts, seqused_k, page_table)
    return result


def _fake(k: Tensor, v: Tensor, indices: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    rows = (indices.shape[0], k.shape[1], indices.shape[2])
    return k.new_empty((*rows, k.shape[3])), v.new_empty((*rows, v.shape[3]))


register_op("gather_kv", _fake)
