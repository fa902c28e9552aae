"""Checks of tensor *values*, run only under `validate=True`: they read the data and so may sync."""

from __future__ import annotations

import torch
from torch import Tensor


def _require(ok: Tensor | bool, op: str, argument: str, rule: str, got: str) -> None:
    if not bool(ok):
        raise ValueError(f"longctx::{op}: `{argument}` must {rule}; got {got}")


def offsets(op: str, argument: str, cu_seqlens: Tensor | None, total: int | None) -> None:
    """`cu_seqlens` starts at 0, never falls and ends at the length of its axis, where that is known."""
    if cu_seqlens is None:
        return
    values = cu_seqlens.tolist()
    _require(values[:1] == [0], op, argument, "start at 0", str(values[:1]))
    falls = [i for i in range(1, len(values)) if values[i] < values[i - 1]]
    _require(not falls, op, argument, "be non-decreasing", f"a smaller value at index {falls[:1]}")
    if total is not None:
        _require(values[-1] == total, op, argument, f"end at the length of its axis, {total}", str(values[-1]))


def segments(op: str, argument: str, segment_offsets: Tensor | None, seqlen_k: int) -> None:
    """`segment_offsets` never falls and lies within [0, seqlen_k]."""
    if segment_offsets is None or segment_offsets.numel() == 0:
        return
    _require((segment_offsets.diff() >= 0).all(), op, argument, "be non-decreasing", "a smaller value")
    low, high = int(segment_offsets[0]), int(segment_offsets[-1])
    _require(low >= 0 and high <= seqlen_k, op, argument, f"be in [0, {seqlen_k}]", f"[{low}, {high}]")


def decays(op: str, argument: str, log_decay: Tensor | None) -> None:
    """`log_decay` is never positive and never NaN."""
    if log_decay is None or log_decay.numel() == 0:
        return
    _require((log_decay <= 0).all(), op, argument, "be <= 0", f"a maximum of {float(log_decay.max())}")


def slots(op: str, argument: str, state_indices: Tensor | None, num_slots: int) -> None:
    """`state_indices` are -1 or in [0, num_slots), and no slot is named twice."""
    if state_indices is None or state_indices.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(state_indices))
    _require(low >= -1 and high < num_slots, op, argument, f"be -1 or in [0, {num_slots})", f"[{low}, {high}]")
    named = state_indices[state_indices >= 0]
    _require(named.unique().numel() == named.numel(), op, argument, "name no slot twice", str(named.tolist()))


def counts(op: str, argument: str, commit: Tensor | None, num_tokens: int) -> None:
    """`commit` is within [0, num_tokens]."""
    if commit is None or commit.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(commit))
    _require(low >= 0 and high <= num_tokens, op, argument, f"be in [0, {num_tokens}]", f"[{low}, {high}]")


def lengths(op: str, argument: str, seqused_k: Tensor | None, seqlen_k: int) -> None:
    """`seqused_k` is within [0, seqlen_k]."""
    if seqused_k is None or seqused_k.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(seqused_k))
    _require(low >= 0 and high <= seqlen_k, op, argument, f"be in [0, {seqlen_k}]", f"[{low}, {high}]")


def ranges(op: str, argument: str, key_ranges: Tensor | None, seqlen_k: int) -> None:
    """Bounds of non-empty ranges lie within [0, seqlen_k]."""
    if key_ranges is None or key_ranges.numel() == 0:
        return
    begin, end = key_ranges.unbind(-1)
    used = begin < end
    inside = ~used | ((begin >= 0) & (end <= seqlen_k))
    _require(inside.all(), op, argument, f"lie in [0, {seqlen_k}]", "a bound outside")


def block_list(op: str, block_indptr: Tensor, block_indices: Tensor, num_k_blocks: int) -> None:
    """`block_indptr` is a CSR row pointer into `block_indices`; rows are ascending block numbers."""
    capacity = block_indices.numel()
    indptr = block_indptr.reshape(-1, block_indptr.shape[-1])
    _require((indptr[:, 1:] >= indptr[:, :-1]).all(), op, "block_indptr", "be non-decreasing", "a smaller value")
    if indptr.numel():
        low, high = (int(x) for x in torch.aminmax(indptr))
        _require(low >= 0 and high <= capacity, op, "block_indptr", f"be in [0, {capacity}]", f"[{low}, {high}]")
    for row_pointers in indptr:
        first, last = int(row_pointers[0]), int(row_pointers[-1])
        listed = block_indices[first:last]
        if not listed.numel():
            continue
        low, high = (int(x) for x in torch.aminmax(listed))
        _require(
            low >= 0 and high < num_k_blocks,
            op,
            "block_indices",
            f"be in [0, {num_k_blocks})",
            f"[{low}, {high}]",
        )
        row_of = torch.repeat_interleave(row_pointers.diff())
        same_row = row_of[1:] == row_of[:-1]
        ascending = (listed[1:] > listed[:-1]) | ~same_row
        _require(
            ascending.all(),
            op,
            "block_indices",
            "be ascending without duplicates in each row",
            "a row that is not",
        )


def zeros(op: str, argument: str, workspace: Tensor | None) -> None:
    if workspace is not None:
        others = int(workspace.count_nonzero())
        _require(others == 0, op, argument, "be zeros", f"{others} other values")


def selection(op: str, indices: Tensor, counts: Tensor | None, lengths: Tensor, block_size_k: int) -> None:
    """`counts` fits `indices`: entries that count are -1 or blocks of `lengths [batch]` keys, none twice in a row."""
    num_entries = indices.shape[3]
    counted = torch.ones_like(indices, dtype=torch.bool)
    if counts is not None:
        within = bool(((counts >= 0) & (counts <= num_entries)).all())
        _require(within, op, "counts", f"be in [0, {num_entries}]", f"[{_low(counts)}, {_high(counts)}]")
        counted = torch.arange(num_entries, device=indices.device) < counts[..., None]
    listed = indices.long().where(counted, -1)
    if listed.numel() == 0:
        return
    inside = (listed >= -1) & (listed * block_size_k < lengths.long()[:, None, None, None])
    got = f"[{_low(listed)}, {_high(listed)}] with {_low(lengths)} to {_high(lengths)} keys in blocks of {block_size_k}"
    _require(inside.all(), op, "indices", "be -1 or blocks of keys that exist", got)
    ordered = listed.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    _require(~twice.any(), op, "indices", "list no entry of a row twice", "a row that does")


def positions(
    op: str, lengths: Tensor, k_positions: Tensor | None, q_positions: Tensor | None, num_positions: int
) -> None:
    """A table of `num_positions` has every token's position and, where keys stand at their indices, every key's."""
    if q_positions is None or k_positions is None:
        _require(
            _high(lengths) <= num_positions, op, "rope_cos_sin", f"have {_high(lengths)} positions", str(num_positions)
        )
    if q_positions is not None and q_positions.numel():
        low, high = _low(q_positions), _high(q_positions)
        inside = low >= 0 and high < num_positions
        _require(inside, op, "q_positions", f"be in [0, {num_positions})", f"[{low}, {high}]")


def keys_of_entries(indices: Tensor, counts: Tensor | None, lengths: Tensor, block_size_k: int) -> Tensor:
    """Like `indices`: how many keys of `lengths [batch]` an entry lists."""
    begin = indices.long() * block_size_k
    keys = (lengths.long()[:, None, None, None] - begin).clamp(0, block_size_k).masked_fill(indices < 0, 0)
    if counts is not None:
        keys[torch.arange(indices.shape[3], device=indices.device) >= counts[..., None]] = 0
    return keys


def key_positions(op: str, k_positions: Tensor | None, keys: Tensor, step: int, num_positions: int) -> None:
    """The `keys` of each entry stand at positions of the table."""
    if k_positions is None or not (keys > 0).any():
        return
    first = k_positions.long()[keys > 0]
    low, high = _low(first), _high(first + step * (keys[keys > 0] - 1))
    inside = low >= 0 and high < num_positions
    _require(inside, op, "k_positions", f"keep keys in [0, {num_positions})", f"[{low}, {high}]")


def key_lists(
    op: str, argument: str, lists: Tensor, counts_of_lists: Tensor | None, ends: Tensor, *, ascending: bool
) -> None:
    """`counts_of_lists` fits `lists [..., num_entries]`, whose entries that count are -1 or in [0, ends [...])."""
    num_entries = lists.shape[-1]
    counts(op, "counts", counts_of_lists, num_entries)
    listed = lists.long()
    if counts_of_lists is not None:
        listed = listed.where(torch.arange(num_entries, device=lists.device) < counts_of_lists[..., None], -1)
    inside = (listed >= -1) & (listed < ends[..., None].long())
    _require(inside.all(), op, argument, "be -1 or keys that exist", f"[{_low(listed)}, {_high(listed)}]")
    if ascending:
        highest = listed.cummax(dim=-1).values if num_entries else listed
        rises = (listed[..., 1:] > highest[..., :-1]) | (listed[..., 1:] < 0)
        _require(rises.all(), op, argument, "ascend in each list", "a list that does not")


def pages(op: str, page_table: Tensor | None, seqused_k: Tensor | None, k: Tensor) -> None:
    """The pages that `seqused_k` keys take are pages of `k`."""
    if page_table is None or seqused_k is None:
        return
    num_pages, page_size = k.shape[0], k.shape[2]
    used = torch.arange(page_table.shape[1], device=k.device) * page_size < seqused_k[:, None]
    listed = page_table[used]
    inside = bool(((listed >= 0) & (listed < num_pages)).all())
    _require(inside, op, "page_table", f"be in [0, {num_pages})", f"[{_low(listed)}, {_high(listed)}]")


def candidates(op: str, listed: Tensor, seqlen_k: int) -> None:
    """`candidates` are -1 or keys."""
    inside = bool(((listed >= -1) & (listed < seqlen_k)).all())
    _require(inside, op, "candidates", f"be -1 or in [0, {seqlen_k})", f"[{_low(listed)}, {_high(listed)}]")


def _low(values: Tensor) -> int:
    return int(values.min()) if values.numel() else 0


def _high(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0


def sequences(
    op: str,
    q: Tensor,
    k: Tensor,
    key_ranges: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
) -> None:
    """The index tensors that all attention ops share."""
    offsets(op, "cu_seqlens_q", cu_seqlens_q, q.shape[2])
    offsets(op, "cu_seqlens_k", cu_seqlens_k, k.shape[2])
    lengths(op, "seqused_k", seqused_k, k.shape[2])
    ranges(op, "key_ranges", key_ranges, k.shape[2])
