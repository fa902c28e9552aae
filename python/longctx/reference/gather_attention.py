"""Naive twin of `longctx.gather_attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.reference.attention import masked_attention


class Selection(NamedTuple):
    """`[batch, num_q_heads, seqlen_q, seqlen_k]`: the set of each row."""

    added: Tensor  # float64, to the scores: -inf outside the set
    positions: Tensor  # int64, of the keys
    entries: Tensor  # int64: which entry lists the key; num_entries where it is forced


def selected_keys(
    indices: Tensor,
    counts: Tensor | None,
    *,
    num_q_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_size_k: int,
    num_first: int,
    num_last: int,
    bias: Tensor | None,
    tree_mask: Tensor | None,
    k_positions: Tensor | None,
    k_position_step: int,
    q_positions: Tensor | None,
    num_positions: int | None,
    seqused_k: Tensor | None,
) -> Selection:
    """Keys at none of `num_positions` positions are not in a set."""
    batch, heads, _, num_entries = indices.shape
    indices = indices.expand(-1, -1, seqlen_q, -1)
    counts = None if counts is None else counts.expand(-1, -1, seqlen_q)
    bias = None if bias is None else bias.expand_as(indices)
    k_positions = None if k_positions is None else k_positions.expand_as(indices)
    added = torch.full((batch, num_q_heads, seqlen_q, seqlen_k), -torch.inf, dtype=torch.float64)
    positions = torch.zeros(added.shape, dtype=torch.int64)
    entries = torch.full(added.shape, num_entries)
    places = token_positions(batch, seqlen_q, seqlen_k, None, seqused_k)
    stands_at = token_positions(batch, seqlen_q, seqlen_k, q_positions, seqused_k)
    key = torch.arange(seqlen_k)
    for b in range(batch):
        for i in range(seqlen_q):
            place, position = int(places[b, i]), int(stands_at[b, i])
            last = slice(max(0, place + 1 - num_last), max(0, place + 1))
            for h in range(num_q_heads):
                head = h * heads // num_q_heads
                kept = num_entries if counts is None else int(counts[b, head, i])
                row, at, of = added[b, h, i], positions[b, h, i], entries[b, h, i]
                for e, entry in enumerate(indices[b, head, i, :kept].tolist()):
                    if entry >= 0:
                        begin = entry * block_size_k
                        block = slice(begin, begin + block_size_k)
                        row[block] = 0.0 if bias is None else float(bias[b, head, i, e])
                        first = begin if k_positions is None else int(k_positions[b, head, i, e])
                        at[block] = first + k_position_step * (key[block] - begin)
                        of[block] = e
                row[last], of[last] = 0.0, num_entries
                at[last] = position - (place - key[last])
                if tree_mask is not None:
                    root = int(places[b, 0])
                    for j in key[last].tolist():
                        at[j] = stands_at[b, j - root] if j >= root else int(stands_at[b, 0]) - (root - j)
                row[:num_first], of[:num_first] = 0.0, num_entries
                at[:num_first] = key[:num_first]
                row[max(0, place + 1) :] = -torch.inf
                if tree_mask is not None:
                    own = key[max(0, root) : root + seqlen_q]
                    row[own] = row[own].masked_fill(~tree_mask[b % len(tree_mask), i, own - root], -torch.inf)
                if num_positions is not None:
                    row[(at < 0) | (at >= num_positions)] = -torch.inf
                    if not 0 <= position < num_positions:
                        row[:] = -torch.inf
    return Selection(added, positions, entries)


def token_positions(
    batch: int, seqlen_q: int, seqlen_k: int, q_positions: Tensor | None, seqused_k: Tensor | None
) -> Tensor:
    """int64 [batch, seqlen_q]: `q_positions`, or where the tokens stand among the keys."""
    if q_positions is not None:
        return q_positions.long()
    lengths = torch.full((batch,), seqlen_k) if seqused_k is None else seqused_k.long()
    return lengths[:, None] - seqlen_q + torch.arange(seqlen_q)


def rotated(rows: Tensor, positions: Tensor, rope_cos_sin: Tensor) -> Tensor:
    """`rows [..., head_dim]` turned by their `positions [...]`; those that the table lacks may turn anyhow."""
    cos, sin = rope_cos_sin[positions.clamp(0, len(rope_cos_sin) - 1)].to(rows.dtype).unbind(-2)
    half = cos.shape[-1]
    a, b, rest = rows.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def from_pages(cache: Tensor, page_table: Tensor, seqused_k: Tensor) -> Tensor:
    """[batch, num_kv_heads, max_pages * page_size, dim] of a paged cache; 0 where `seqused_k` has no key."""
    _, heads, page_size, dim = cache.shape
    keys = cache.new_zeros(page_table.shape[0], heads, page_table.shape[1] * page_size, dim)
    for b, used in enumerate(seqused_k.tolist()):
        for key in range(used):
            page = int(page_table[b, key // page_size])
            keys[b, :, key] = cache[page, :, key % page_size]
    return keys


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
) -> tuple[Tensor, ...]:
    """Dense attention under the mask of what was selected; see `longctx.gather_attention`. Needs no `workspace`."""
    if page_table is not None and seqused_k is not None:
        k, v = (from_pages(cache, page_table, seqused_k) for cache in (k, v))
    batch, num_q_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    added, positions, entries = selected_keys(
        indices,
        counts,
        num_q_heads=num_q_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_size_k=block_size_k,
        num_first=num_first,
        num_last=num_last,
        bias=bias,
        tree_mask=tree_mask,
        k_positions=k_positions,
        k_position_step=k_position_step,
        q_positions=q_positions,
        num_positions=None if rope_cos_sin is None else rope_cos_sin.shape[0],
        seqused_k=seqused_k,
    )
    dtype = v.dtype
    if rope_cos_sin is not None:
        q = q.double()
        k, v = (keys.double().repeat_interleave(num_q_heads // k.shape[1], dim=1) for keys in (k, v))
        stands_at = token_positions(batch, seqlen_q, seqlen_k, q_positions, seqused_k)
        q = rotated(q, stands_at[:, None].expand(q.shape[:3]), rope_cos_sin)

    def attend(added: Tensor) -> tuple[Tensor, Tensor]:
        # Row by row: a key that another row selected may hold anything.
        results = []
        for i in range(seqlen_q) or [None]:
            row = slice(0, 0) if i is None else slice(i, i + 1)
            keys = k if rope_cos_sin is None or i is None else rotated(k, positions[:, :, i], rope_cos_sin)
            results.append(
                masked_attention(
                    q[:, :, row],
                    keys,
                    v,
                    ~torch.isneginf(added[:, :, row]),
                    softmax_scale=softmax_scale,
                    softcap=softcap,
                    sinks=None,
                    bias=added[:, :, row],
                )
            )
        out, lse = zip(*results, strict=True)
        return torch.cat(out, dim=2).to(dtype), torch.cat(lse, dim=2).to(torch.promote_types(dtype, torch.float32))

    out, lse = attend(added)
    heads, tokens, num_states = indices.shape[1], indices.shape[2], indices.shape[3] + 1
    states = []
    if return_key_mass or return_block_states:
        states = [attend(added.masked_fill(entries != e, -torch.inf)) for e in range(num_states)]
    results = [out, lse]
    if return_key_mass:
        mass = torch.stack([(state[1].double() - lse.double()).exp() for state in states], dim=-1)
        mass = mass.masked_fill(torch.isneginf(lse)[..., None], 0.0)
        shared = (batch, heads, num_q_heads // heads, tokens, seqlen_q // max(tokens, 1), num_states)
        results.append(mass.reshape(shared).sum(dim=(2, 4)).float())
    if return_block_states:
        results += [torch.stack(parts) for parts in zip(*states, strict=True)]
    return tuple(results)
