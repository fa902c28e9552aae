"""What the layers of all caches share: where keys and values lie, how many there are, how attention finds them.

transformers hands a cache new keys in `update` and passes what it returns to the attention function, without the
cache. So the returned keys carry their layer as an attribute (`LAYER`), which torch.compile keeps, and the registered
attention function asks it what to do: a call with few query tokens is `LongctxLayer.attend`, a longer one runs dense or
by the model's policy and ends with `LongctxLayer.prefilled`. New tokens count only when that function has accepted the
call (`commit`), so an error leaves the cache as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from longctx.cache.call import CallContext, Counts
from longctx.cache.storage import Storage
from longctx.cache.workspaces import Workspaces
from longctx.ops import append_kv, attention, gather_kv

# The attribute of a keys tensor that names its layer.
LAYER = "_longctx_layer"
IMPLEMENTATION = "longctx"


class LongctxLayer(CacheLayerMixin):
    """One layer of a cache: keys and values in growing storages; by itself, a dense cache.

    A method overrides `attend` and, where it prepares or drops keys, `prefilled`, `make_room`, `appending` and
    `cropped`. The first two see `k` and `v` `[batch, num_kv_heads, n, dim]` with the call's own tokens at the end, and
    a context whose `seqused_k` (int32 `[batch]`, or None: all `n`) says how many keys each row has: rows differ in
    length after a left-padded prompt, whose padding is dropped. With `max_cache_len` shapes are static, `seqused_k` is
    always given, `n` is the capacity, and nothing is read on the host.

    A method keeps its state beside keys and values in attributes that it names in `STATE`: each None, a `Storage`, or a
    tensor `[batch, ...]` that is replaced rather than written in place (with static shapes: written in place rather
    than replaced). They then follow beams, forks and files. Plain values that files must hold are named in `PLAIN`.

    Attributes:
        seen: positions so far, padding and dropped keys included: int; with static shapes an int64 scalar tensor.
        slots: keys stored for the longest row: int; with static shapes the capacity.
        rows: int32 `[batch]`, keys stored for each row; None where every row has `slots`.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    PLAIN: ClassVar[tuple[str, ...]] = ("seen", "slots", "ragged", "filled", "evicted")
    is_sliding = False
    # Calls with at most so many query tokens decode: one token, a draft, a short turn.
    max_seqlen_q: ClassVar[int] = 16

    def __init__(self, config: Any, layer_idx: int, max_cache_len: int | None = None) -> None:
        self.config = config
        self.layer_idx = layer_idx
        self.max_cache_len = max_cache_len
        self.workspaces = Workspaces()  # replaced by the one that all layers of a cache share
        self.reset()

    def reset(self) -> None:
        """Empties the layer; with static shapes its tensors stay where they are."""
        self.counts = Counts()
        self._awaiting = False  # keys were handed out that no attention call has brought back
        self._padding: Tensor | None = None  # int64 [batch] of the call in progress
        self.ragged = False  # rows differ
        self.filled = False  # a call has been accepted
        self.evicted = False  # keys were dropped: the past cannot come back
        if self.max_cache_len is not None and getattr(self, "is_initialized", False):
            for tensor in (self.seen, self.rows):
                tensor.zero_()
            self.cropped()
            return
        self.is_initialized = False
        self._k: Storage | None = None
        self._v: Storage | None = None
        self.seen: Any = 0
        self.slots = 0
        self.rows: Any = None
        for name in self.STATE:
            setattr(self, name, None)

    # For a method to override.

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        """Attention of a few tokens `q [batch, num_q_heads, seqlen_q, head_dim]`, in q's shape and v's head_dim."""
        self.count(k.shape[2], q.shape[2])
        out, _ = attention(q, k, v, **context.options())
        return out

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        """Called after a longer call has run and its tokens were counted; its queries stand at the last keys."""

    def make_room(self, seqlen_q: int) -> None:
        """Called before the tokens of a call are written: the time to drop keys."""

    def appending(self, end: int) -> dict[str, Any]:
        """Called before the tokens of a call that may go to `attend` are written, as the last ones before key `end`.

        Returns:
            The summary that `append_kv` is to update with them, in its keywords.
        """
        return {}

    def cropped(self) -> None:
        """Called after the last keys were taken away: forget what was made of them."""

    # For a method to call.

    def workspace(self, q: Tensor) -> Tensor:
        """What `gather_attention` takes of that name, for queries `q` of a call that came to `attend`."""
        return self.workspaces.zeros(q.device, q.shape[:3].numel())

    def make_workspace(self) -> None:
        """For every call to come: before a graph is compiled that finds it."""
        size = self.batch_size * self.config.num_attention_heads * self.max_seqlen_q
        zeros = self.workspaces.zeros(self.device, size)
        if self.max_cache_len is not None:
            self.mark_static(zeros)

    def count(self, keys_read: int, seqlen_q: int) -> None:
        """Notes that each of `seqlen_q` tokens read `keys_read` keys per kv head."""
        if not torch.compiler.is_compiling():
            self.counts.calls += 1
            self.counts.tokens += seqlen_q
            self.counts.keys_read += min(keys_read, self.slots + seqlen_q) * seqlen_q
            self.counts.keys_stored += (int(self.seen) + seqlen_q) * seqlen_q

    def keep(self, indices: Tensor, counts: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Drops all keys but those at ascending int32 `indices [batch, 1 or num_kv_heads, n]`, of each row's `counts`.

        Args:
            counts: int32 `[batch, heads]`, as `topk_select` returns it.
            rows: int32 `[batch]`, keys that each row then has. `None`: `n`.
        """
        assert self.keys is not None
        assert self.values is not None
        kept = gather_kv(self.keys, self.values, indices, counts)
        self.slots = indices.shape[2]
        self._k, self._v = (Storage(x).writable(self.slots, self.slots + 1, self.slots) for x in kept)
        self.rows = rows
        self.evicted = True

    def fill(self, keys: Tensor, values: Tensor, queries: Tensor | None = None) -> None:
        """Appends `[batch, heads, n, dim]` of a prompt that were computed elsewhere; `None` stands for queries of 0."""
        self.update(keys, values)
        self._awaiting = False
        if queries is None:
            queries = keys.new_zeros(()).expand(keys.shape[0], self.config.num_attention_heads, *keys.shape[2:])
        self.finish(queries, position_ids=torch.arange(keys.shape[2], device=self.device)[None] + self.seen)

    # For the attention function.

    def arrive(self, module: nn.Module) -> None:
        """The keys have come to the attention of `module`."""
        self._awaiting = False
        if module.config is not self.config:
            raise ValueError(
                "longctx: this cache was made from the config of another model; make it from `model.config` of the "
                "model it is used with"
            )

    def begin(self, seqlen_q: int, key_ranges: Tensor | None) -> Tensor | None:
        """Looks for padding in a call's mask, and says what dense attention sees of the keys that `update` returned."""
        self._padding = None
        if key_ranges is not None and (seqlen_q > 1 or not self.filled):
            self._padding = self._left_padding(seqlen_q, key_ranges)
        if not self.ragged or not self.filled:
            return key_ranges
        end = self.rows[:, None] + torch.arange(1, seqlen_q + 1, dtype=torch.int32, device=self.device)
        start = torch.zeros_like(end) if self._padding is None else self._padding[:, None].int().expand_as(end)
        return torch.stack([start, end], dim=-1)[:, None]

    def decodes(self, seqlen_q: int) -> bool:
        """Whether a call goes to `attend`."""
        return self.filled and self._padding is None and seqlen_q <= self.max_seqlen_q

    def context(self, seqlen_q: int, **known: Any) -> CallContext:
        """Of the call in progress, which has `seqlen_q` tokens."""
        seqused, start = (None, self.slots) if self.rows is None else (self.rows + seqlen_q, self.rows)
        return CallContext(seqused_k=seqused, start=start, **known)

    def finish(self, q: Tensor, **known: Any) -> None:
        """Ends a call that did not go to `attend`."""
        start = self.slots if self.rows is None else self.rows.clone()
        self.commit(q.shape[2])
        assert self.keys is not None
        assert self.values is not None
        context = CallContext(seqused_k=self.rows, start=start, **known)
        self.prefilled(q, self.keys, self.values, context)

    def commit(self, seqlen_q: int) -> None:
        """Counts the tokens of a call that was accepted."""
        self.filled = True
        if self.max_cache_len is not None:
            self.seen.add_(seqlen_q)
            self.rows.add_(seqlen_q)
        else:
            self.seen += seqlen_q
            self.slots += seqlen_q
            self.rows = None if self.rows is None else self.rows + seqlen_q
        if self._padding is not None:
            self._drop_padding(seqlen_q, self._padding)
            self._padding = None

    def _left_padding(self, seqlen_q: int, key_ranges: Tensor) -> Tensor | None:
        """Tokens of padding in front of each row of the call; None if there are none. Reads values, in prefill only."""
        present = key_ranges[:, -1, :, 0] < key_ranges[:, -1, :, 1]  # a query that is padding sees nothing
        padding = seqlen_q - present.sum(1)
        stored = self.slots if self.rows is None else self.rows
        if not self.filled:
            stored = 0
        left = torch.arange(seqlen_q, device=padding.device) >= padding[:, None]
        fits = (present == left).all() & ((padding == 0) | torch.as_tensor(stored == 0, device=padding.device)).all()
        rule = "longctx: a cache takes padding only in front of the first tokens of a sequence; pad on the left"
        if torch.compiler.is_compiling():
            torch._assert_async(fits & (padding == 0).all(), rule + ", and prefill outside of a compiled graph")
            return None
        if not fits:
            raise NotImplementedError(rule)
        return padding if bool(padding.any()) else None

    def _drop_padding(self, seqlen_q: int, padding: Tensor) -> None:
        """Moves rows that began with padding to the front."""
        assert self._k is not None
        assert self._v is not None
        for row, skipped in enumerate(padding.tolist()):
            for data in (self._k.data, self._v.data) if skipped else ():
                data[row, :, : seqlen_q - skipped] = data[row, :, skipped:seqlen_q].clone()
        if self.max_cache_len is not None:
            self.rows.sub_(padding)
        else:
            rows = torch.full_like(padding, self.slots, dtype=torch.int32) if self.rows is None else self.rows
            self.rows = (rows - padding).int()
            self.slots = int(self.rows.max())
        self.ragged = True

    # For transformers.

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.max_cache_len is not None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.evicted

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The stored keys `[batch, num_kv_heads, slots, head_dim]`, a view."""
        return None if self._k is None else self._k.data[:, :, : self.slots]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self._v is None else self._v.data[:, :, : self.slots]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        capacity = self.max_cache_len or 0
        self._k, self._v = Storage.like(key_states, capacity), Storage.like(value_states, capacity)
        self.device, self.batch_size = key_states.device, key_states.shape[0]
        self.is_initialized = True
        self.make_workspace()
        if self.max_cache_len is not None:
            self.slots = self.max_cache_len
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
            self.rows = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
            self.mark_static(self._k.data, self._v.data, self.seen, self.rows)

    def mark_static(self, *tensors: Tensor) -> None:
        """Tells torch.compile that these tensors, which it will see written, stay where they are."""
        if not torch.compiler.is_compiling():
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new tokens behind the stored ones and returns all; they count once attention has accepted them."""
        self._check_update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        assert self._k is not None
        assert self._v is not None
        new = key_states.shape[2]
        if self.filled:
            self.make_room(new)
        end = self.slots
        if self.max_cache_len is None:
            end += new
            start = 0 if self.ragged else self.slots
            self._k = self._k.writable(start, end, self.slots)
            self._v = self._v.writable(start, end, self.slots)
        keys, values = self._k.data[:, :, :end], self._v.data[:, :, :end]
        beside = self.appending(end) if self.filled and new <= self.max_seqlen_q else {}
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if recorded:
            key_states, value_states = key_states.detach(), value_states.detach()
        append_kv(keys, values, key_states, value_states, self.slots if self.rows is None else self.rows, **beside)
        if recorded:
            keys = keys.detach().requires_grad_()  # attention then says that it has no backward
        setattr(keys, LAYER, self)
        self._awaiting = True
        return keys, values

    def _check_update(self, key_states: Tensor, value_states: Tensor) -> None:
        implementation = self.config._attn_implementation
        if implementation != IMPLEMENTATION:
            raise ValueError(
                f"longctx: a cache needs the model that its config belongs to, running on attn_implementation="
                f"'{IMPLEMENTATION}' (longctx.apply, or from_pretrained); the config says {implementation!r}"
            )
        if self._awaiting:
            raise ValueError(
                "longctx: the last keys never came to longctx's attention function; make the cache from `model.config` "
                "of the very model it is used with"
            )
        if self._k is None or self._v is None:
            return
        for name, storage, states in (("keys", self._k, key_states), ("values", self._v, value_states)):
            stored, got = storage.data, states
            if (stored.shape[:2], stored.shape[3:], stored.dtype) != (got.shape[:2], got.shape[3:], got.dtype):
                shape = [*stored.shape[:2], "*", *stored.shape[3:]]
                raise ValueError(
                    f"longctx: the cache holds {name} [batch, num_kv_heads, *, dim] = {shape} {stored.dtype}; got "
                    f"{list(got.shape)} {got.dtype}; use a new cache, or `reset()`"
                )
        if self.max_cache_len is not None and self.layer_idx == 0:
            torch._assert_async(
                self.seen + key_states.shape[2] <= self.max_cache_len,
                f"longctx: the cache is full: it was made for max_cache_len={self.max_cache_len} tokens",
            )

    def get_seq_length(self) -> Any:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.slots + query_length, self.seen - self.slots

    def crop(self, tokens_to_remove: int) -> None:
        """Takes away the last `-tokens_to_remove` tokens, as transformers counts them."""
        if tokens_to_remove > 0:
            raise ValueError(f"longctx: `crop` takes minus the number of tokens to remove; got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if self.evicted:
            raise NotImplementedError("longctx: a cache that has dropped keys cannot be cropped; `fork` it before")
        if self.max_cache_len is not None:
            self.seen.add_(tokens_to_remove).clamp_(min=0)
            self.rows.add_(tokens_to_remove).clamp_(min=0)
        else:
            self.seen = max(self.seen + tokens_to_remove, 0)
            self.slots = max(self.slots + tokens_to_remove, 0)
            self.rows = None if self.rows is None else (self.rows + tokens_to_remove).clamp(min=0)
        self.cropped()

    def offload(self) -> None:
        """Moves keys and values to the host; `update` brings them back."""
        if self._k is not None and self._v is not None:
            self._k, self._v = self._k.map(Tensor.cpu), self._v.map(Tensor.cpu)

    def prefetch(self) -> None:
        if self._k is not None and self._v is not None and self._k.data.device != self.device:
            self._k, self._v = (s.map(lambda x: x.to(self.device, non_blocking=True)) for s in (self._k, self._v))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rebatch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rebatch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rebatch(lambda x: x[indices.to(x.device)])

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._map_state(lambda x: x.map(change) if isinstance(x, Storage) else change(x))
        if self._k is not None:
            self.batch_size = self._k.data.shape[0]
            self.make_workspace()

    def fork(self) -> LongctxLayer:
        """A layer of its own with the same past: storages are shared until one of the two writes where both read."""
        twin = copy.copy(self)
        twin.counts = Counts()
        if self.max_cache_len is not None:
            twin.seen = self.seen.clone() if self.is_initialized else 0
            twin._map_state(lambda x: x.map(Tensor.clone) if isinstance(x, Storage) else x.clone())
        else:
            self._map_state(lambda x: x.share() if isinstance(x, Storage) else x)
        return twin

    def _map_state(self, change: Callable[[Any], Any]) -> None:
        """Applies `change` to every storage and tensor with a batch dimension."""
        for name in ("_k", "_v", "rows", *self.STATE):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))
