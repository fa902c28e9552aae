"""gather_attention: attention of a few query tokens over keys that were selected for them, read where they stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op
from longctx.ops.attention import empty_outputs


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    block_size_k: int = 1,
    num_first: int = 0,
    num_last: int = 0,
    bias: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_positions: Tensor | None = None,
    k_position_step: int = 1,
    q_positions: Tensor | None = None,
    rope_cos_sin: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_key_mass: bool = False,
    return_block_states: bool = False,
    workspace: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, ...]:
    """Softmax attention of a few query tokens over keys selected for them, without copying these together.

    `out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j] + bias[j]) v[j]` over the keys `j` of token `i`'s set. Token
    `i` stands at key position `p = seqlen_k - seqlen_q + i` and its set never holds later keys: of the keys
    up to `p`, those in the listed blocks, the first `num_first` and the last `num_last`. A key counts once,
    however often it is meant.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64, bfloat16 or float16; one or a few
            tokens. Any strides with a contiguous last dim, as for k and v.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`; `num_q_heads % num_kv_heads == 0`.
        v: `[batch, num_kv_heads, seqlen_k, head_dim_v]`.
        indices: int32 `[batch, heads, seqlen_q or 1, num_entries]`, heads 1, `num_kv_heads` or `num_q_heads`:
            entry `e` lists keys `[e * block_size_k, (e + 1) * block_size_k)`. With 1 or `num_kv_heads`
            heads, all query heads of a kv head share one pass over its keys; with 1 token (or a stride of 0),
            all tokens. Any order (ascending reads fastest); negative entries and those past the visible keys
            are skipped. An entry must not be listed twice.
        counts: int32 `[batch, heads, seqlen_q or 1]`: only so many first entries count. `None`: all.
        block_size_k: keys of an entry: 1 for single tokens, else the page size of the selection.
        num_first, num_last: this many keys at the start and at the end of the visible ones belong to every
            set, once even if listed.
        bias: float32 like `indices`: added to the scores (after the softcap) of the keys of an entry; -inf
            leaves the entry out. Keys that `num_first` and `num_last` add have none.
        tree_mask: bool `[batch or 1, seqlen_q, seqlen_q]`: token `i` sees the key of token `j <= i`, one of the last
            `seqlen_q`, only where `tree_mask[.., i, j]`: speculative tokens that are a tree, parents first. `None`:
            all of them.
        rope_cos_sin: float32 `[max_positions, 2, rotary_dim / 2]`, contiguous, `2 <= rotary_dim <= head_dim`: cosines
            and sines of the angles at each position. q and k are then given without a rotary embedding and
            rotated here, in float32: dims `d` and `d + rotary_dim / 2` turn together (the halves of Llama),
            dims from `rotary_dim` on are left alone. Keys, and tokens, at positions that the table does not
            have are skipped.
        k_positions: int32 like `indices`: where the first key of an entry stands, so that selected keys may move
            closer together. `None`: at its index in the sequence. A key that `num_first` adds stands at its
            index, one that `num_last` adds as far before the token's position as it lies before the token; with
            a `tree_mask`, the keys of the tokens stand at their `q_positions` and those before as far before
            the first of these (list keys that should stand elsewhere as entries).
        k_position_step: 1: the next keys of an entry stand at the next positions; 0: all stand at the entry's.
        q_positions: int32 `[batch, seqlen_q]`: where each token stands. `None`: at its index, as for keys. Decides
            nothing about which keys a token may see.
        seqused_k: int32 `[batch]`: keys at or beyond it do not exist; positions use it as seqlen_k.
        page_table: int32 `[batch, max_pages]`: key `j` of entry `b` is row `j % page_size` of page
            `page_table[b, j // page_size]`; k and v are then `[num_pages, num_kv_heads, page_size, ..]`.
            Needs `seqused_k`. Keys of pages that do not exist are skipped.
        softmax_scale: factor on `q . k`; `None` means `head_dim ** -0.5`.
        softcap: `> 0` turns the scaled score `s` into `softcap * tanh(s / softcap)`.
        return_key_mass: also return how much softmax probability each entry got.
        return_block_states: also return the attention over each entry alone. Each is computed apart: for blocks
            of keys, not for single tokens.
        workspace: int32 zeros `[at least batch * num_q_heads * seqlen_q]`, contiguous, which the call counts in and
            leaves as zeros: on CUDA it saves the launch that joins the parts of long sets, with the same bits. Calls
            that follow each other may share one; calls, or CUDA graphs, that may run at the same time may not. After
            a launch that failed, fill it with zeros anew. `None`: a launch more where sets are split. The CPU needs
            none.
        validate: also check the values of index tensors, positions and workspace (reads them): entries that count are
            -1 or have a key below `seqused_k`, none of them twice in a list.

    Returns:
        `out [batch, num_q_heads, seqlen_q, head_dim_v]` in q's dtype, and `lse [batch, num_q_heads,
        seqlen_q]`, natural log, float32 (float64 for float64). An empty set gives `out = 0`, `lse = -inf`.
        With `return_key_mass` then `key_mass`, float32 `[batch, heads, seqlen_q or 1, num_entries + 1]` of `indices`:
        probability summed over the keys of an entry and over the query heads and tokens that share it; the last
        is that of the forced keys. With `return_block_states` then `block_out [num_entries + 1, batch, num_q_heads,
        seqlen_q, head_dim_v]` and `block_lse` without the last dim: what `merge_states` takes; the last are those
        of the forced keys. Merged they are `(out, lse)`; merged with landmarks' logits as `lse_override`, the
        grouped softmax of Landmark Attention.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * (head_dim + head_dim_v)` FLOPs per query head, token and selected key; every selected row of K
    and V is read once per kv head and token: bound by memory. Deterministic: the same bits on any number of
    threads. A rotary embedding adds 3 FLOPs per dim of a selected key and the row of the table that it reads. On CUDA
    one launch where sets are short or a workspace is given (docs/cuda.md says which are split, and when two launches
    are faster all the same), one more with `return_key_mass`.
    Rotated rows stay float32 on the CPU; on CUDA those of 16 bits are rounded to their dtype again, as in
    transformers: tensor cores take nothing wider.
    Gradients: none yet (raises NotImplementedError).
    Source: the gather step of Quest (arXiv 2406.10774), TidalDecode (arXiv 2410.05076), InfLLM (arXiv
    2402.04617) and others; a bias as in MagicPIG (arXiv 2410.16179); positions as in StreamingLLM
    (arXiv 2309.17453), LongHeads (arXiv 2402.10685) and Landmark Attention (arXiv 2305.16300); the parts join
    as in FlashDecoding.

    Example:
        >>> import torch, longctx
        >>> q = torch.randn(1, 8, 1, 64)
        >>> k, v = torch.randn(2, 1, 2, 1000, 64)
        >>> scores = (q.unflatten(1, (2, 4)) @ k.unsqueeze(2).transpose(3, 4)).mean(dim=2)
        >>> indices = scores.topk(100).indices.sort().values.int()  # [batch, num_kv_heads, seqlen_q, 100]
        >>> out, lse = longctx.gather_attention(q, k, v, indices, num_first=4, num_last=32)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 1, 64]), torch.Size([1, 8, 1]))
    """
    if validate:
        seqlen_k = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
        _validate.lengths("gather_attention", "seqused_k", seqused_k, seqlen_k)
        _validate.pages("gather_attention", page_table, seqused_k, k)
        used = q.new_full((q.shape[0],), seqlen_k, dtype=torch.int32) if seqused_k is None else seqused_k
        _validate.selection("gather_attention", indices, counts, used, block_size_k)
        _validate.zeros("gather_attention", "workspace", workspace)
        if rope_cos_sin is not None:
            num_positions = rope_cos_sin.shape[0]
            _validate.positions("gather_attention", used, k_positions, q_positions, num_positions)
            keys = _validate.keys_of_entries(indices, counts, used, block_size_k)
            _validate.key_positions("gather_attention", k_positions, keys, k_position_step, num_positions)
    out, lse, key_mass, block_out, block_lse = call(
        torch.ops.longctx.gather_attention,
        q,
        k,
        v,
        indices,
        counts,
        block_size_k,
        num_first,
        num_last,
        bias,
        tree_mask,
        k_positions,
        k_position_step,
        q_positions,
        rope_cos_sin,
        seqused_k,
        page_table,
        softmax_scale,
        softcap,
        return_key_mass,
        return_block_states,
        workspace,
    )
    return out, lse, *([key_mass] if return_key_mass else []), *([block_out, block_lse] if return_block_states else [])


_ARGUMENTS = [argument.name for argument in torch.ops.longctx.gather_attention.default._schema.arguments]


def _fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    q: Tensor = call["q"]
    out, lse = empty_outputs(q, call["v"])
    batch, heads, tokens, num_entries = call["indices"].shape
    mass_batch = batch if call.get("return_key_mass") else 0
    num_states = num_entries + 1 if call.get("return_block_states") else 0
    return (
        out,
        lse,
        q.new_empty((mass_batch, heads, tokens, num_entries + 1), dtype=torch.float32),
        q.new_empty((num_states, *out.shape)),
        lse.new_empty((num_states, *lse.shape)),
    )


register_op("gather_attention", _fake)
