"""Summaries of the pages of one layer, which stay in memory when the pages leave."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import summarize_pages, update_pages
from longctx.store.tier import Lanes
from longctx.store.tiers import Tiers


class PageSummary:
    """What `page_scores` needs of each page: made as tokens are appended, from the frames that hold them.

    Args:
        tiers: where the pages are.
        lanes: of the layer.
        method: `"minmax"` (Quest) or `"mean"`.
        max_tokens: room to begin with, so that a context of known length never moves.

    Two rows of head_dim values a page and kv head (`"mean"`: one): 1/64 of K and V with pages of 64 tokens.

    Attributes:
        num_pages: of the longest sequence; what stands behind the pages of a shorter one means nothing.
    """

    def __init__(
        self, tiers: Tiers, lanes: Lanes, *, method: Literal["minmax", "mean"] = "minmax", max_tokens: int = 0
    ) -> None:
        self.tiers = tiers
        self.lanes = lanes
        self.method: Literal["minmax", "mean"] = method
        self.num_pages = 0
        geometry = tiers.geometry
        rows = (2,) if method == "minmax" else ()
        shape = (len(lanes), 1, geometry.num_pages(max_tokens), *rows, geometry.head_dim)
        self._data = torch.empty(shape, dtype=geometry.dtype, device=tiers.top.device)

    @property
    def pages(self) -> Tensor:
        """`[batch, num_kv_heads, num_pages, 2, head_dim]` (`"mean"`: without the 2), as `summarize_pages` makes it."""
        return self.of(range(self.tiers.geometry.batch))

    def of(self, sequences: range) -> Tensor:
        """`pages` of these sequences."""
        heads = self.tiers.geometry.num_kv_heads
        pages: Tensor = self._data[sequences.start * heads : sequences.stop * heads, 0, : self.num_pages]
        return pages.reshape(len(sequences), heads, *pages.shape[1:])

    def update(self, sequences: range, start: int, end: int) -> None:
        """Takes in tokens `[start, end)`, whose pages have frames in the top tier."""
        tier, geometry = self.tiers.top, self.tiers.geometry
        first, last = start // geometry.page_size, geometry.num_pages(end)
        self._reserve(last)
        begin = first * geometry.page_size  # the pages before it need not be there
        rows = slice(sequences.start * geometry.num_kv_heads, sequences.stop * geometry.num_kv_heads)
        lanes = self.lanes[rows]
        update_pages(
            self._data[rows, :, first:last],
            tier.k,
            start - begin,
            geometry.page_size,
            method=self.method,
            seqused_k=torch.full((len(lanes),), end - begin, dtype=torch.int32, device=tier.device),
            page_table=tier.page_table(lanes)[:, first:last].contiguous(),
        )

    def take(self, sequences: range, start: int, end: int, k: Tensor) -> None:
        """Takes in tokens `[start, end)`, K of which is given; `start` begins a page."""
        geometry = self.tiers.geometry
        self._reserve(geometry.num_pages(end))
        rows = slice(sequences.start * geometry.num_kv_heads, sequences.stop * geometry.num_kv_heads)
        pages = slice(start // geometry.page_size, geometry.num_pages(end))
        self._data[rows, 0, pages] = summarize_pages(k, geometry.page_size, method=self.method).flatten(0, 1)

    def copy(self, sequence: int, source: int, begin: int, end: int) -> None:
        """Gives a sequence pages `[begin, end)` of another."""
        heads = self.tiers.geometry.num_kv_heads
        to, of = (slice(one * heads, (one + 1) * heads) for one in (sequence, source))
        self._data[to, :, begin:end] = self._data[of, :, begin:end]

    def _reserve(self, num_pages: int) -> None:
        if num_pages > self._data.shape[2]:
            old = self._data
            self._data = old.new_empty((*old.shape[:2], num_pages + num_pages // 4 + 16, *old.shape[3:]))
            self._data[:, :, : old.shape[2]] = old
