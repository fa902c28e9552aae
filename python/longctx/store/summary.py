"""Summaries of the pages of one layer, which stay in memory when the pages leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from longctx.ops import summarize_pages, update_pages

if TYPE_CHECKING:
    from longctx.store.layer import StoreLayer


class PageSummary:
    """What `page_scores` needs of each page: made as tokens are appended, from the frames that hold them.

    Args:
        layer: whose pages; those it has are read once.
        method: `"minmax"` (Quest) or `"mean"`.
        max_tokens: room to begin with, so that a context of known length never moves.

    Two rows of head_dim values a page and kv head (`"mean"`: one): 1/64 of K and V with pages of 64 tokens.
    """

    def __init__(self, layer: StoreLayer, *, method: Literal["minmax", "mean"] = "minmax", max_tokens: int = 0) -> None:
        self.layer = layer
        self.method: Literal["minmax", "mean"] = method
        geometry = layer.store.geometry
        rows = (2,) if method == "minmax" else ()
        shape = (len(layer.lanes), 1, geometry.num_pages(max_tokens), *rows, geometry.head_dim)
        self._data = torch.empty(shape, dtype=geometry.dtype, device=layer.store.top.device)

    @property
    def pages(self) -> Tensor:
        """`[batch, num_kv_heads, num_pages, 2, head_dim]` (`"mean"`: without the 2), as `summarize_pages` makes it."""
        geometry = self.layer.store.geometry
        pages: Tensor = self._data[:, 0, : geometry.num_pages(self.layer.num_tokens)]
        return pages.reshape(geometry.batch, geometry.num_kv_heads, *pages.shape[1:])

    def update(self, start: int, end: int) -> None:
        """Takes in tokens `[start, end)`, whose pages have frames in the top tier."""
        tier, geometry = self.layer.store.top, self.layer.store.geometry
        first, last = start // geometry.page_size, geometry.num_pages(end)
        self._reserve(last)
        begin = first * geometry.page_size  # the pages before it need not be there
        update_pages(
            self._data[:, :, first:last],
            tier.k,
            start - begin,
            geometry.page_size,
            method=self.method,
            seqused_k=torch.full((len(self.layer.lanes),), end - begin, dtype=torch.int32, device=tier.device),
            page_table=tier.page_table(self.layer.lanes)[:, first:last].contiguous(),
        )

    def take(self, start: int, end: int, k: Tensor) -> None:
        """Takes in tokens `[start, end)`, K of which is given; `start` begins a page."""
        geometry = self.layer.store.geometry
        self._reserve(geometry.num_pages(end))
        pages = slice(start // geometry.page_size, geometry.num_pages(end))
        self._data[:, 0, pages] = summarize_pages(k, geometry.page_size, method=self.method).flatten(0, 1)

    def _reserve(self, num_pages: int) -> None:
        if num_pages > self._data.shape[2]:
            old = self._data
            self._data = old.new_empty((*old.shape[:2], num_pages + num_pages // 4 + 16, *old.shape[3:]))
            self._data[:, :, : old.shape[2]] = old
