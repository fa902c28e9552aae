"""Naive twin of `longctx.select_blocks`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_FLOAT32_MAX = torch.finfo(torch.float32).max
Entry = tuple[int, int]  # (row of the map, key block)


def _maps(
    num_rows: int,
    num_k_blocks: int,
    batch: int,
    block_size_q: int,
    block_size_k: int,
    causal: bool,
    q_offset: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
) -> Iterator[tuple[int, int, int, list[int]]]:
    """(batch index, first row, number of key blocks, visible key blocks of each row) per sequence."""
    sequences = []  # batch index, first row, rows, key blocks, key position of the first query
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        first_row = 0
        for len_q, len_k in zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True):
            rows = -(-len_q // block_size_q)
            sequences.append((0, first_row, rows, -(-len_k // block_size_k), len_k - len_q))
            first_row += rows
    elif seqused_k is not None:
        for b, len_k in enumerate(seqused_k.tolist()):
            sequences.append((b, 0, num_rows, -(-len_k // block_size_k), len_k + q_offset))
    else:
        sequences = [(b, 0, num_rows, num_k_blocks, q_offset) for b in range(batch)]
    for b, first_row, rows, blocks, offset in sequences:
        visible = []
        for i in range(rows):
            last = (offset + (i + 1) * block_size_q - 1) // block_size_k if causal else blocks - 1
            visible.append(max(0, min(blocks, last + 1)))
        yield b, first_row, blocks, visible


def _choose(scores: dict[Entry, float], forced: set[Entry], method: str, value: float, num_entries: int) -> list[Entry]:
    """The entries that one cut over `scores` keeps beside the forced ones, best first."""
    order = sorted(scores, key=lambda entry: (-scores[entry], entry))
    candidates = [e for e in order if e not in forced and scores[e] > -math.inf]
    best = max(scores.values(), default=-math.inf)
    if method == "top_k":
        return candidates[: max(0, int(value))]
    if method == "threshold":
        return [e for e in candidates if scores[e] >= value]
    if method == "relative":
        limit = float(torch.tensor(value, dtype=torch.float32) * torch.tensor(best, dtype=torch.float32))
        return [e for e in candidates if scores[e] >= limit]
    if best <= 0.0:
        return []
    exponent = math.frexp(min(best, _FLOAT32_MAX))[1] - 1
    shift = min(40, 61 - num_entries.bit_length()) - exponent
    mass = {e: math.floor(math.ldexp(min(max(s, 0.0), _FLOAT32_MAX), shift)) for e, s in scores.items()}
    total = sum(mass.values())
    target = min(total, math.ceil(min(max(value, 0.0), 1.0) * float(total)))
    reached = sum(mass[e] for e in forced)
    chosen = []
    for entry in candidates:
        if reached >= target:
            break
        chosen.append(entry)
        reached += mass[entry]
    return chosen


def select_blocks(
    scores: Tensor,
    *,
    method: str = "top_k",
    value: float | Tensor,
    scope: str = "row",
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
) -> tuple[Tensor, Tensor]:
    """`(block_indptr, block_indices)` from sorted Python lists; see `longctx.select_blocks`.

    A score of NaN counts as -inf, and -inf is listed only where forced. `value` is rounded to
    float32. With `scope="head"` one cut serves the whole map of a head of a sequence. `q_offset` is
    the key position of the first query row, counted from `seqused_k` if given (then -seqlen_q).
    """
    batch, heads, num_rows, num_k_blocks = scores.shape
    limit = num_k_blocks if max_blocks_per_row is None else min(max_blocks_per_row, num_k_blocks)
    values = torch.as_tensor(value, dtype=torch.float32).expand(heads).tolist()
    lists: dict[tuple[int, int, int], list[int]] = {}
    maps = _maps(
        num_rows,
        num_k_blocks,
        batch,
        block_size_q,
        block_size_k,
        causal,
        q_offset,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
    )
    for b, first_row, blocks, visible in maps:
        regions = [range(len(visible))] if scope == "head" else [range(i, i + 1) for i in range(len(visible))]
        for h in range(heads):
            table = torch.nan_to_num(scores[b, h].cpu(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            for region in regions:
                entries = {(i, j): float(table[first_row + i, j]) for i in region for j in range(visible[i])}
                forced = {(i, j) for i, j in entries if j < num_first or j >= visible[i] - num_local}
                chosen = _choose(entries, forced, method, values[h], len(region) * blocks)
                for i in region:
                    kept = [j for row, j in forced if row == i]
                    kept += [j for row, j in chosen if row == i][: limit - len(kept)]
                    lists[b, h, first_row + i] = sorted(kept)
    indptr: list[int] = []
    indices: list[int] = []
    for b in range(batch):
        for h in range(heads):
            for row in range(num_rows):
                indptr.append(len(indices))
                indices += lists.get((b, h, row), [])
            indptr.append(len(indices))
    capacity = batch * heads * num_rows * limit
    indices += [-1] * (capacity - len(indices))
    return (
        torch.tensor(indptr, dtype=torch.int64, device=scores.device).view(batch, heads, num_rows + 1),
        torch.tensor(indices, dtype=torch.int32, device=scores.device),
    )
