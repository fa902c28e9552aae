"""compact_kv: keeps the listed keys of caches, moved to the front in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._kv_rows import layers, list_ends, refuse_gradients
from longctx.ops._register import register_op


def compact_kv(
    k_cache: Tensor | Sequence[Tensor],
    v_cache: Tensor | Sequence[Tensor],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Evicts from caches in place: row `i` becomes what row `indices[b, h, i]` was, and the rest is no longer used.

    Rows behind the new length keep whatever they hold. Sources ascend, so every row is read before it is written, and
    rows that stand where they should are not touched. Entries past `counts`, -1, keys that do not exist and entries
    that do not ascend are left out: the next one takes their place.

    Args:
        k_cache: `[batch, num_kv_heads, seqlen_k, head_dim]`, float32, float64, bfloat16 or float16; any strides
            with a contiguous last dim. With `page_table`: `[num_pages, num_kv_heads, page_size, head_dim]`. Or a
            sequence of such tensors of one shape, the layers of a model that keep the same keys. **Changed in place.**
        v_cache: `[batch, num_kv_heads, seqlen_k, head_dim_v]`, or in pages, and as many layers as `k_cache`.
            **Changed in place.**
        indices: int32 `[batch, heads, num_entries]`, ascending, with 1 or `num_kv_heads` heads. One head is a list for
            all of them; what `topk_select` returns has the right order.
        counts: int32 `[batch, heads]`: how many entries of each list count. `None`: all.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist. Needed with `page_table`.
        page_table: int32 `[batch, max_pages]`: key `j` is row `j % page_size` of page `page_table[b, j // page_size]`.
            No page that changes may belong to two batch entries.
        validate: also check that counts, indices, seqused_k and page_table lie in range and that indices ascend (reads
            them).

    Returns:
        int32 `[batch, heads]`: the number of keys that each list kept. With one head, `[:, 0]` is the new `seqused_k`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given, and no cache
            has changed.
        NotImplementedError: a cache requires a gradient.

    Cost: no arithmetic; each row that moves is read and written once. Nothing is copied to the host. Deterministic.
    Gradients: none (raises NotImplementedError).
    Source: the evictions of SirLLM (arXiv 2405.12528), StreamingLLM (2309.17453) and SnapKV (2404.14469).

    Example:
        >>> import torch, longctx
        >>> k, v = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 24)
        >>> kept = torch.tensor([0, 1, 97, 98, 99], dtype=torch.int32).view(1, 1, 5)
        >>> last = v[0, :, 99].clone()
        >>> longctx.compact_kv(k, v, kept)
        tensor([[5]], dtype=torch.int32)
        >>> torch.equal(v[0, :, 4], last)
        True
    """
    k_layers, v_layers = layers(k_cache), layers(v_cache)
    if validate and k_layers:
        ends = list_ends("compact_kv", k_layers[0], indices.shape[0], seqused_k, page_table)
        _validate.key_lists("compact_kv", "indices", indices, counts, ends[:, None], ascending=True)
    refuse_gradients("compact_kv", [*k_layers, *v_layers])
    lengths: Tensor = torch.ops.longctx.compact_kv(k_layers, v_layers, indices, counts, seqused_k, page_table)
    return lengths


def _fake(k_cache: list[Tensor], v_cache: list[Tensor], indices: Tensor, *options: object) -> Tensor:
    return indices.new_empty(indices.shape[:2])


register_op("compact_kv", _fake, differentiable=False)
