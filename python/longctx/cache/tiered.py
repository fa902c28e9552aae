"""Quest's selection over keys that lie in a page store: on the device, in host memory, on disk."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longctx.cache.base import LAYER, LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.ops import page_scores, topk_select
from longctx.store import PageGeometry, PageStore, StoreLayer

HeadReduce = Literal["group_mean", "group_max", "group_sum", "all_sum"]


class TieredQuestLayer(LongctxLayer):
    """Keys and values live in the store alone; what a call brings is appended when attention has it."""

    stored: StoreLayer | None = None
    _new: tuple[Tensor, Tensor] | None = None  # keys and values of the call in progress

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        store: PageStore,
        budget: int,
        num_first: int,
        num_last: int,
        head_reduce: HeadReduce,
        **shapes: Any,
    ) -> None:
        super().__init__(config, layer_idx, **shapes)
        self.budget, self.num_first, self.num_last = budget, num_first, num_last
        self.head_reduce: HeadReduce = head_reduce
        self.store, self.stored = store, store.layers[layer_idx]
        if self.stored.summary is None:
            self.stored.summarize()
        self.seen = self.slots = self.stored.num_tokens
        self.filled = self.slots > 0
        self.is_initialized = True
        self.device, self.batch_size = store.top.device, store.geometry.batch

    def reset(self) -> None:
        super().reset()
        if self.stored is not None:
            self.stored.rewind(0)
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values; a long call after the first gets the past too, which is read for it densely."""
        self._check_update(key_states, value_states)
        assert self.stored is not None
        self.stored.check_tokens(key_states, value_states)
        self._new = key_states, value_states
        keys, values = key_states.view_as(key_states), value_states
        if self.filled and key_states.shape[2] > self.max_seqlen_q:
            past_keys, past_values = self.stored.read(0, self.slots)
            keys = torch.cat([past_keys, key_states], dim=2)
            values = torch.cat([past_values, value_states], dim=2)
        setattr(keys, LAYER, self)
        self._awaiting = True
        return keys, values

    def begin(self, seqlen_q: int, key_ranges: Tensor | None) -> Tensor | None:
        key_ranges = super().begin(seqlen_q, key_ranges)
        if self._padding is not None:
            self._padding = None
            raise NotImplementedError("longctx: a page store holds sequences of one length; it takes no padding")
        return key_ranges

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        assert self.stored is not None
        self._new = None
        self.stored.append(k, v)
        try:
            out, lse = self._attend(q, context)
        except BaseException:
            self.stored.rewind(self.slots)
            raise
        return context.weigh_sinks(out, lse)

    def _attend(self, q: Tensor, context: CallContext) -> tuple[Tensor, Tensor]:
        assert self.stored is not None
        assert self.stored.summary is not None
        page_size = self.store.geometry.page_size
        summary = self.stored.summary.pages
        # Tokens of a draft choose by summaries that hold all of it; a page that begins behind a token scores -inf.
        used = torch.full((q.shape[0],), self.stored.num_tokens, dtype=torch.int32, device=summary.device)
        scores = page_scores(
            q.to(summary.device), summary, head_reduce=self.head_reduce, seqused_k=used, page_size=page_size
        )
        pages, counts = topk_select(scores, min(self.budget // page_size, scores.shape[-1]))
        self.count(self.budget + self.num_first + self.num_last, q.shape[2])
        return self.stored.attend(
            q,
            pages,
            counts,
            num_first=self.num_first,
            num_last=self.num_last,
            softmax_scale=context.softmax_scale,
            softcap=context.softcap,
        )

    def finish(self, q: Tensor, **known: Any) -> None:
        assert self.stored is not None
        assert self._new is not None
        self.stored.append(*self._new)
        self._new = None  # the store alone has a prompt
        self.commit(q.shape[2])

    def cropped(self) -> None:
        assert self.stored is not None
        self.stored.rewind(self.slots)

    def fork(self) -> LongctxLayer:
        raise NotImplementedError("longctx: a cache in a page store cannot be forked; `rewind` takes tokens back")

    def _rebatch(self, change: Any) -> None:
        raise NotImplementedError(
            "longctx: sequences of a page store cannot be reordered, repeated or selected: decode without beams"
        )


class TieredQuestCache(LongctxCache):
    """Quest over a page store: a context that does not fit in memory, decoded from the pages that each token needs.

    Page minima and maxima stay in memory (1/64 of K and V with pages of 64 tokens) and bound what a page can
    score; the best pages are brought from wherever they are and read in place. A prompt is prefilled densely and goes
    to the store layer by layer. What the store has when the cache is made is its past: reopen a file to go on.

    Args:
        config: `model.config` of the model it will be used with: the very object.
        store: a `longctx.store.PageStore` of the model's geometry.
        budget: keys that each kv head reads because of their page's score, in whole pages.
        num_first, num_last: keys at the start and at the end that are read too; make the store keep their pages
            (`num_first_pages`, `num_last_pages`).
        head_reduce: how the query heads of a kv head agree on pages (`longctx.page_scores`).

    Sequences have one length: padding, beams and forks raise. `rewind` and assisted decoding work. No static shapes.
    Source: Quest (arXiv 2406.10774), whose first two layers are dense; here none is.

    Example:
        >>> import tempfile, torch, longctx, transformers
        >>> from longctx.store import PageGeometry, PageStore
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> geometry = PageGeometry.of(model.config, page_size=16)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with PageStore(geometry, path=f"{directory}/kv", max_host_bytes=1 << 20) as store:
        ...         cache = longctx.cache.TieredQuestCache(model.config, store=store, budget=64)
        ...         prompt = torch.ones(1, 300, dtype=torch.long)
        ...         tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=4)
        >>> tokens.shape
        torch.Size([1, 304])
    """

    name: ClassVar[str] = "tiered_quest"

    def __init__(
        self,
        config: Any,
        *,
        store: PageStore,
        budget: int = 2048,
        num_first: int = 64,
        num_last: int = 64,
        head_reduce: HeadReduce = "group_max",
    ) -> None:
        page_size = store.geometry.page_size
        require("budget", budget, at_least=page_size)
        expected = PageGeometry.of(config, batch=store.geometry.batch, page_size=page_size, dtype=store.geometry.dtype)
        if different := expected.differences(store.geometry):
            raise ValueError(f"longctx: `store` is not of this model's geometry: it has {different}")
        self.store = store
        store.rewind(store.num_tokens)
        options = {"budget": budget, "num_first": num_first, "num_last": num_last, "head_reduce": head_reduce}
        super().__init__(config, TieredQuestLayer, options, store=store)

    def fork(self) -> LongctxCache:
        raise NotImplementedError("longctx: a cache in a page store cannot be forked; `rewind` takes tokens back")

    def save(self, path: Any) -> None:
        raise NotImplementedError("longctx: the store's file holds this cache: `store.commit()`, then `PageStore.open`")
