"""The cache of a model of linear attention layers: one state a layer, whose size no number of tokens changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from longctx.linear import LightningState


class LightningCache(Cache):
    """What `generate` hands from step to step; empty until the first forward pass.

    It can be reordered for beams, repeated, copied to `branch` off, and reset, but not rolled back: a state does not
    know what it was before its last token. So assisted decoding is refused.

    Attributes:
        states: of each layer, `LightningState`.
        seqlen: positions seen, padding included: what transformers calls the length of a cache.
    """

    # transformers asks its caches by these; ours takes full prompts apart by `get_seq_length`, like one that grows.
    is_compileable = False
    is_croppable = False
    is_linear = [False]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[LightningState] = []
        self.seqlen = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"LightningCache({len(self.states)} layers, {self.seqlen} positions)"

    def advance(self, states: Sequence[LightningState], num_positions: int) -> None:
        """Takes the states after `num_positions` more positions."""
        self.states = list(states)
        self.seqlen += num_positions

    def branch(self) -> LightningCache:
        """A copy that goes its own way."""
        twin = LightningCache()
        twin.advance([state.clone() for state in self.states], self.seqlen)
        return twin

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seqlen

    def reset(self) -> None:
        self.states, self.seqlen = [], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rebatch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rebatch(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rebatch(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *_: Any) -> None:
        raise NotImplementedError(
            "longctx: a LightningCache cannot be cropped, its states do not know what they were before; keep a "
            "`branch()` of the cache from before, or decode without assistance"
        )

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [
            LightningState(kv=change(state.kv), num_tokens=change(state.num_tokens)) for state in self.states
        ]
