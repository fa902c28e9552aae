"""The rows of a cache as sequences of a page store."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longctx.store import Claim, PageStore, neighbours

if TYPE_CHECKING:
    from longctx.cache.tiered import TieredQuestLayer


class StoreRows:
    """Which sequence each row is; the layers of one cache have this in common.

    Args:
        sequences: empty before the first call, which takes as many as it has rows.
        temporary: emptied when the cache is gone.
    """

    def __init__(self, store: PageStore, sequences: Sequence[int], *, temporary: bool = False) -> None:
        self.store = store
        self._layers: list[weakref.ref[TieredQuestLayer]] = []
        self._claim(sequences, temporary)

    def _claim(self, sequences: Sequence[int], temporary: bool) -> None:
        self._held: Claim = self.store.claim(sequences, temporary=temporary)
        self.runs = neighbours(sequences)
        self.in_order = [rows for _, rows in self.runs] == [list(range(len(sequences)))]

    @property
    def sequences(self) -> list[int]:
        return self._held.sequences

    @property
    def layers(self) -> list[TieredQuestLayer]:
        """Of the cache, the first one first."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def add(self, layer: TieredQuestLayer) -> None:
        self._layers.append(weakref.ref(layer))

    def check(self, num_rows: int) -> None:
        """Before a call with so many rows; the first one takes sequences for them."""
        if not self.sequences:
            self._claim(self.store.unused(num_rows), self._held.temporary)
        self._held.check()

    def choose(self, rows: Sequence[int]) -> None:
        """Row `i` becomes what row `rows[i]` is. One row of each stays where it is; the others are copies."""
        self._held.check()
        old = self.sequences
        spare = [sequence for row, sequence in enumerate(old) if row not in rows]
        missing = len(rows) - len(set(rows)) - len(spare)
        spare += self.store.unused(missing) if missing > 0 else []
        new: list[int] = []
        copies = []
        for row in rows:
            if old[row] in new:
                copies.append((spare.pop(0), old[row]))
                new.append(copies[-1][0])
            else:
                new.append(old[row])
        self.store.share(copies)
        self.store.empty(spare)
        self._claim(new, self._held.temporary)

    def fork(self) -> StoreRows:
        """Sequences that are the same from here back, of another cache."""
        self._held.check()
        twin = StoreRows(self.store, self.store.unused(len(self.sequences)), temporary=True)
        self.store.share(list(zip(twin.sequences, self.sequences, strict=True)))
        return twin

    def keep(self) -> None:
        """The sequences outlive the cache."""
        self._held.temporary = False

    def release(self) -> None:
        """Empties the sequences and gives them back."""
        self._held.check()
        self.store.empty(self.sequences)
        self._claim([], self._held.temporary)
