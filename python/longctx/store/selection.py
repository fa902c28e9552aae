"""Attention over selected pages of a layer, wherever they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longctx.store._host import NoFrameError
from longctx.store.attend import TierPart, attend_part
from longctx.store.geometry import PageGeometry
from longctx.store.tier import Frames, Lanes, Pages, Tier
from longctx.store.tiers import Tiers

Lengths = NDArray[np.int64]


def by_lane(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[batch, heads, ..]` as `[lanes, heads of a lane, ..]`."""
    if x.shape[1] == 1:
        x = x.expand(-1, num_kv_heads, *x.shape[2:])
    return x.reshape(x.shape[0] * num_kv_heads, x.shape[1] // num_kv_heads, *x.shape[2:])


def selected_pages(
    geometry: PageGeometry,
    lanes: Lanes,
    lengths: Lengths,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    block_size_k: int,
    num_first: int = 0,
    num_last: int = 0,
    seqlen_q: int = 1,
) -> tuple[Lanes, Pages]:
    """The pages that a call reads, by lane and ascending.

    Args:
        lengths: tokens of each lane.
        indices, counts: by lane, as in `gather_attention`.
    """
    page_size = geometry.page_size
    num_pages = -(-lengths // page_size)
    most = int(num_pages.max(initial=0))
    entries = indices.cpu().numpy()
    pages = entries.astype(np.int64) * block_size_k // page_size
    listed = (entries >= 0) & (pages < num_pages.reshape(-1, 1, 1, 1))
    if counts is not None:
        listed &= np.arange(entries.shape[-1]) < counts.cpu().numpy()[..., None]
    # One number a page: lanes one after the other.
    begins = np.arange(len(lanes)) * most
    chosen = [(pages + begins.reshape(-1, 1, 1, 1))[listed]]
    for length in np.unique(lengths).tolist():
        forced = np.arange(-(-min(num_first, length) // page_size))
        if num_last > 0:
            last = np.arange(max(0, length - seqlen_q + 1 - num_last) // page_size, geometry.num_pages(length))
            forced = np.concatenate([forced, last])
        chosen.append(np.add.outer(begins[lengths == length], forced).ravel())
    needed = np.unique(np.concatenate(chosen))
    if most == 0:
        return needed, needed
    return needed // most + lanes[0], needed % most


def attend_pages(
    tiers: Tiers,
    lanes: Lanes,
    num_pages: int,
    q: Tensor,
    selection: tuple[Lanes, Pages],
    indices: Tensor,
    counts: Tensor | None,
    **options: Any,
) -> list[tuple[Tensor, Tensor]]:
    """Parts of the attention of neighbouring `lanes`, to be merged: `(out, lse)` of each tier and piece."""
    states = []
    chosen, pages = selection
    if tiers.device is None:
        with contextlib.suppress(NoFrameError), tiers.hold_host(chosen, pages):
            # The live table: of other pages nothing is read.
            part = TierPart(tiers.host.k, tiers.host.v, tiers.host.page_table(lanes))
            return [attend_part(q, part, indices, counts, **options)]
    else:
        near = tiers.device.resident(chosen, pages)
        if near.any():
            with tiers.hold_device(chosen[near], pages[near]) as frames:
                part = part_of(tiers.device, lanes, num_pages, chosen[near], pages[near], frames)
                states.append(attend_part(q, part, indices, counts, **options))
        chosen, pages = chosen[~near], pages[~near]
    pieces = [(chosen, pages)] if len(pages) or not states else []
    while pieces:
        chosen, pages = pieces.pop()
        try:
            with tiers.hold_host(chosen, pages) as frames:
                part = part_of(tiers.host, lanes, num_pages, chosen, pages, frames)
                states.append(attend_part(q, part, indices, counts, **options))
                tiers.promote(chosen, pages, frames)
        except NoFrameError as error:
            if len(pages) == 1:
                raise tiers.no_room(error) from None
            half = len(pages) // 2
            pieces += [(chosen[half:], pages[half:]), (chosen[:half], pages[:half])]
    return states


def part_of(tier: Tier, lanes: Lanes, num_pages: int, chosen: Lanes, pages: Pages, frames: Frames) -> TierPart:
    """These pages of neighbouring `lanes` and no others."""
    table = np.full((len(lanes), num_pages), -1, dtype=np.int32)
    table[chosen - lanes[0], pages] = frames
    return TierPart(tier.k, tier.v, torch.from_numpy(table).to(tier.device))


def neighbours(ids: Iterable[int]) -> list[tuple[range, list[int]]]:
    """Sequences as runs that follow each other in the store: each with the rows of the call that they are.

    Example:
        >>> from longctx.store import neighbours
        >>> neighbours([4, 0, 5, 1])
        [(range(0, 2), [1, 3]), (range(4, 6), [0, 2])]
    """
    runs: list[tuple[range, list[int]]] = []
    for row, sequence in sorted(enumerate(ids), key=lambda pair: pair[1]):
        if runs and runs[-1][0].stop == sequence:
            runs[-1] = range(runs[-1][0].start, sequence + 1), [*runs[-1][1], row]
        else:
            runs.append((range(sequence, sequence + 1), [row]))
    return runs
