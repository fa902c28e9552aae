"""Which cache has which sequences of a store."""

from __future__ import annotations

import weakref
from collections.abc import Sequence


class Claim:
    """Sequences that one cache has, a row each; gone with the last reference to it."""

    def __init__(self, book: Sequences, sequences: Sequence[int], temporary: bool) -> None:
        self.sequences = list(sequences)
        self.temporary = temporary
        self._book = book

    def check(self) -> None:
        """Raises if another cache has got the sequences meanwhile."""
        if any(self._book.owner(sequence) is not self for sequence in self.sequences):
            raise ValueError(
                "longctx: sequences of this cache belong to another one now, which was made later from the same page "
                "store; use that, or give each its `sequences`"
            )

    def __del__(self) -> None:
        if self.temporary:
            self._book.abandon(self)


class Sequences:
    """The book of claims."""

    def __init__(self, batch: int) -> None:
        self._owners: list[weakref.ref[Claim] | None] = [None] * batch
        self._abandoned: list[int] = []  # by claims that are gone; emptied when the store is used next

    def owner(self, sequence: int) -> Claim | None:
        reference = self._owners[sequence]
        return None if reference is None else reference()

    def is_temporary(self, sequence: int) -> bool:
        owner = self.owner(sequence)
        return owner is not None and owner.temporary

    def claim(self, sequences: Sequence[int], *, temporary: bool) -> Claim:
        batch = len(self._owners)
        if len(set(sequences)) != len(sequences) or not all(0 <= s < batch for s in sequences):
            raise ValueError(
                f"longctx: `sequences` must be distinct sequences of a page store that has {batch}; "
                f"got {list(sequences)}"
            )
        claim = Claim(self, sequences, temporary)
        for sequence in sequences:
            self._owners[sequence] = weakref.ref(claim)
        return claim

    def free(self) -> list[int]:
        return [sequence for sequence in range(len(self._owners)) if self.owner(sequence) is None]

    def abandon(self, claim: Claim) -> None:
        """Of a claim that is going: sequences that no later one has got."""
        self._abandoned += [s for s in claim.sequences if self.owner(s) in (claim, None)]

    def take_abandoned(self) -> list[int]:
        taken, self._abandoned = self._abandoned, []
        return [sequence for sequence in taken if self.owner(sequence) is None]
