"""A tensor that grows along its sequence dimension without a copy per token, and can be shared until it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longctx.cache.huge_pages import HUGE_PAGE, on_huge_pages


@dataclass(eq=False)
class Storage:
    """Rows `[batch, heads, capacity, ...]`, of which the first `end` have been written.

    Growing by a quarter makes four copies of a row in all, however many tokens arrive one by one. Two owners may
    share a storage and both append: the first to write behind `end` does so in place, the other one copies.
    """

    data: Tensor
    end: int = 0
    shared: bool = False

    @classmethod
    def like(cls, rows: Tensor, capacity: int) -> Storage:
        """Empty, for rows such as these `[batch, heads, n, ...]`."""
        data = rows.new_empty((*rows.shape[:2], capacity, *rows.shape[3:]))
        # A head's last huge page is resident as a whole; of four and more that is less than what growth leaves free.
        head_bytes = data.stride(1) * data.element_size()
        return cls(on_huge_pages(data) if head_bytes >= 4 * HUGE_PAGE else data)

    def writable(self, start: int, stop: int, keep: int) -> Storage:
        """A storage with the same first `keep` rows, in which rows from `start` to `stop` may be written."""
        capacity = self.data.shape[2]
        if stop <= capacity and (start >= self.end or not self.shared):
            self.end = max(self.end, stop)
            return self
        fresh = Storage.like(self.data, capacity if stop <= capacity else stop + stop // 4 + 64)
        fresh.data[:, :, :keep] = self.data[:, :, :keep]
        fresh.end = stop
        return fresh

    def share(self) -> Storage:
        """Itself, now with two owners."""
        self.shared = True
        return self

    def map(self, change: Callable[[Tensor], Tensor]) -> Storage:
        """A storage of its own, with `change` applied to the data."""
        return Storage(change(self.data), self.end)
