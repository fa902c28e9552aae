"""Layers that cannot do what others can, and say so."""

from __future__ import annotations

from typing import ClassVar

from longctx.cache.base import LongctxLayer


class Uncroppable(LongctxLayer):
    """Cannot give back its last tokens."""

    NOT_CROPPED: ClassVar[str]  # the sentence that says so, and why

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0 and self.is_initialized:
            raise NotImplementedError(f"longctx: {self.NOT_CROPPED}; `fork` it before")


class Unpadded(LongctxLayer):
    """Takes no padding, because it counts from the first token."""

    NOT_PADDED: ClassVar[str]

    def decodes(self, seqlen_q: int) -> bool:
        if self._padding is not None:
            raise NotImplementedError(f"longctx: {self.NOT_PADDED}; give the rows of a batch the same length")
        return super().decodes(seqlen_q)
