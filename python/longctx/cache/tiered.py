"""Quest's selection over keys that lie in a page store: on the device, in host memory, on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from longctx.cache.base import LAYER, LongctxLayer
from longctx.cache.cache import FORMAT, LongctxCache, require
from longctx.cache.call import CallContext, Counts
from longctx.cache.store_rows import StoreRows
from longctx.ops import page_scores, topk_select
from longctx.store import PageGeometry, PageStore, StoreLayer

HeadReduce = Literal["group_mean", "group_max", "group_sum", "all_sum"]


class TieredQuestLayer(LongctxLayer):
    """Keys and values live in the store alone; what a call brings is appended when attention has it."""

    stored: StoreLayer
    _new: tuple[Tensor, Tensor] | None = None  # keys and values of the call in progress

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        in_store: StoreRows,
        budget: int,
        num_first: int,
        num_last: int,
        head_reduce: HeadReduce,
        read_ahead: int,
        **shapes: Any,
    ) -> None:
        super().__init__(config, layer_idx, **shapes)
        self.budget, self.num_first, self.num_last = budget, num_first, num_last
        self.head_reduce: HeadReduce = head_reduce
        self.read_ahead = read_ahead
        self.in_store, self.stored = in_store, in_store.store.layers[layer_idx]
        if self.stored.summary is None:
            self.stored.summarize()
        self.device = in_store.store.top.device
        in_store.add(self)
        self.count_stored()

    def reset(self) -> None:
        super().reset()
        self.is_initialized = True

    def count_stored(self) -> None:
        """Takes over from the store how many keys each row has."""
        lengths = self.lengths
        self.batch_size = len(lengths)
        self.slots = max(lengths, default=0)
        self.seen = max(self.seen, self.slots)
        self.filled = self.filled or self.slots > 0
        self.ragged = self.ragged or len(set(lengths)) > 1
        self.rows = torch.tensor(lengths, dtype=torch.int32, device=self.device) if self.ragged else None

    @property
    def lengths(self) -> list[int]:
        """Keys of each row."""
        return [int(self.stored.lengths[sequence]) for sequence in self.in_store.sequences]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values; a call that does not decode gets the past too, which is read for it densely."""
        self._check_update(key_states, value_states)
        self.in_store.check(key_states.shape[0])
        self.batch_size = len(self.in_store.sequences)
        self.stored.check_tokens(key_states, value_states, self.batch_size)
        self._new = key_states, value_states
        keys, values = key_states.view_as(key_states), value_states
        # Padding may come as long as a row is empty, and a call with padding does not decode.
        if self.filled and (key_states.shape[2] > self.max_seqlen_q or 0 in self.lengths):
            keys, values = self._with_past(key_states, value_states)
        setattr(keys, LAYER, self)
        self._awaiting = True
        return keys, values

    def _with_past(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, num_kv_heads, slots + n, dim]`: of each row the stored ones, then the new ones."""
        new = key_states.shape[2]
        whole = [x.new_zeros((*x.shape[:2], self.slots + new, x.shape[3])) for x in (key_states, value_states)]
        for row, (sequence, length) in enumerate(zip(self.in_store.sequences, self.lengths, strict=True)):
            past = self.stored.read(0, length, sequences=range(sequence, sequence + 1))
            for x, stored, states in zip(whole, past, (key_states, value_states), strict=True):
                x[row, :, :length] = stored[0]
                x[row, :, length : length + new] = states[row]
        return whole[0], whole[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        self._append()
        try:
            out, lse = self._attend(q, context)
        except BaseException:
            self._take_back()
            raise
        return context.weigh_sinks(out, lse)

    def _attend(self, q: Tensor, context: CallContext) -> tuple[Tensor, Tensor]:
        if self.in_store.in_order:
            return self._attend_run(q, self.in_store.runs[0][0], context)
        parts = [self._attend_run(q[rows], run, context) for run, rows in self.in_store.runs]
        order = torch.tensor([row for _, rows in self.in_store.runs for row in rows]).argsort().to(q.device)
        out, lse = (torch.cat(part)[order] for part in zip(*parts, strict=True))
        return out, lse

    def _attend_run(self, q: Tensor, sequences: range, context: CallContext) -> tuple[Tensor, Tensor]:
        """Of rows that are neighbours in the store."""
        assert self.stored.summary is not None
        page_size = self.stored.geometry.page_size
        summary = self.stored.summary.of(sequences)
        # Tokens of a draft choose by summaries that hold all of it; a page that begins behind a token scores -inf.
        lengths = self.stored.lengths[sequences.start : sequences.stop]
        used = torch.from_numpy(lengths).to(summary.device, torch.int32)
        scores = page_scores(
            q.to(summary.device), summary, head_reduce=self.head_reduce, seqused_k=used, page_size=page_size
        )
        num_pages = min(self.budget // page_size, scores.shape[-1])
        pages, counts = topk_select(scores, num_pages)
        ahead = None
        if self.read_ahead and self.stored.tiers.file is not None:
            ahead, _ = topk_select(scores, min(num_pages + self.read_ahead, scores.shape[-1]))
        self.count(self.budget + self.num_first + self.num_last, q.shape[2])
        return self.stored.attend(
            q,
            pages,
            counts,
            sequences=sequences,
            num_first=self.num_first,
            num_last=self.num_last,
            softmax_scale=context.softmax_scale,
            softcap=context.softcap,
            ahead=ahead,
        )

    def finish(self, q: Tensor, **known: Any) -> None:
        self._append(None if self._padding is None else self._padding.tolist())
        self.commit(q.shape[2])

    def commit(self, seqlen_q: int) -> None:
        self.seen += seqlen_q
        self.filled = True
        self.ragged = self.ragged or self._padding is not None
        self._padding = None
        self.count_stored()

    def _append(self, padding: list[int] | None = None) -> None:
        """What the call brought goes to the store, all rows or none."""
        assert self._new is not None
        k, v = self._new
        self._new = None  # the store alone has a prompt
        try:
            for run, rows in self.in_store.runs:
                skip = None if padding is None else [padding[row] for row in rows]
                one = slice(None) if self.in_store.in_order else rows
                self.stored.append(k[one], v[one], sequences=run, skip=skip)
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        """After an error: the tokens of the call in progress leave this layer and those that it has been through."""
        self._rewind(self.slots if self.rows is None else self.rows.tolist())
        for layer in self.in_store.layers:
            if layer.seen > self.seen:
                layer.crop(self.seen - layer.seen)

    def cropped(self) -> None:
        self._rewind(self.slots if self.rows is None else self.rows.tolist())

    def _rewind(self, lengths: int | list[int]) -> None:
        for run, rows in self.in_store.runs:
            if isinstance(lengths, int):
                self.stored.rewind(lengths, sequences=run)
                continue
            for sequence, row in zip(run, rows, strict=True):
                self.stored.rewind(lengths[row], sequences=range(sequence, sequence + 1))

    def fork_into(self, in_store: StoreRows) -> TieredQuestLayer:
        """This layer over other sequences, which hold the same."""
        twin = copy.copy(self)
        twin.counts, twin.in_store = Counts(), in_store
        in_store.add(twin)
        return twin


class TieredQuestCache(LongctxCache):
    """Quest over a page store: a context that does not fit in memory, decoded from the pages that each token needs.

    Page minima and maxima stay in memory (1/64 of K and V with pages of 64 tokens) and bound what a page can
    score; the best pages are brought from wherever they are and read in place. A prompt is prefilled densely and goes
    to the store layer by layer. What the store has when the cache is made is its past: reopen a file to go on.

    Each row is a sequence of the store, whose geometry has as many (`batch`) as rows and forks are there at a time.
    Beams and forks share full pages, in memory and in the file, and copy the last, partly filled one and the summaries;
    a fork's sequences are free again when it is gone. Rows differ in length after left padding, which is not stored. An
    error, such as a full disk in the middle of a token, takes the token back from all layers.

    Args:
        config: `model.config` of the model it will be used with: the very object.
        store: a `longctx.store.PageStore` of the model's geometry, with at least as many sequences (`batch`) as rows.
        budget: keys that each kv head reads because of their page's score, in whole pages.
        num_first, num_last: keys at the start and at the end that are read too; make the store keep their pages
            (`num_first_pages`, `num_last_pages`).
        head_reduce: how the query heads of a kv head agree on pages (`longctx.page_scores`).
        read_ahead: of the pages that score next best, how many of each kv head the disk brings in the background, for
            the next token. It halves the misses, and pays on a slow disk only (docs/topk_kv.md, Page store).
        sequences: of the store, one a row. `None`: those that hold tokens, or in an empty store, as many as the first
            call has rows.
        max_cache_len: raises. Which pages a token reads is decided on the host, where the disk is: no graph holds that.

    `save` writes what the store's file does not hold, a few bytes a row; `longctx.cache.load(.., store=store)`.
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
        ...         tokens = model.generate(prompt, **cache.as_argument(), max_new_tokens=4)
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
        read_ahead: int = 0,
        sequences: Sequence[int] | None = None,
        max_cache_len: int | None = None,
    ) -> None:
        if max_cache_len is not None:
            raise NotImplementedError(
                "longctx: a cache in a page store has no static shapes: the host decides which pages a token reads, "
                "and no compiled graph holds that; leave `max_cache_len` out, or use QuestCache"
            )
        page_size = store.geometry.page_size
        require("budget", budget, at_least=page_size)
        require("read_ahead", read_ahead, at_least=0)
        expected = PageGeometry.of(config, batch=store.geometry.batch, page_size=page_size, dtype=store.geometry.dtype)
        if different := expected.differences(store.geometry):
            raise ValueError(f"longctx: `store` is not of this model's geometry: it has {different}")
        self.store = store
        if (store.lengths != [layer.lengths for layer in store.layers]).any():
            store.rewind(store.lengths)  # a writer that died left them between two layers
        self.in_store = StoreRows(store, store.with_tokens() if sequences is None else sequences)
        options = {"budget": budget, "num_first": num_first, "num_last": num_last, "head_reduce": head_reduce}
        super().__init__(config, TieredQuestLayer, {**options, "read_ahead": read_ahead}, in_store=self.in_store)

    @property
    def sequences(self) -> list[int]:
        """Of the store: which one each row is."""
        return list(self.in_store.sequences)

    def fork(self) -> LongctxCache:
        twin = object.__new__(type(self))
        in_store = self.in_store.fork()
        layers = [layer.fork_into(in_store) for layer in self.in_store.layers]
        twin.__dict__.update(self.__dict__, in_store=in_store, layers=layers)
        return twin

    def reset(self) -> None:
        self.in_store.release()
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(torch.arange(len(self.sequences))[indices.cpu()].tolist())

    def _choose(self, rows: list[int]) -> None:
        if rows != list(range(len(self.sequences))):
            self.in_store.choose(rows)
            for layer in self.in_store.layers:
                layer.count_stored()

    def save(self, path: str | Path) -> None:
        """Commits the store, and writes to a file what else `longctx.cache.load` needs to make the cache again.

        Give `load` the reopened store: `load(path, model.config, store=store)`.
        """
        if self.store.file is None:
            raise NotImplementedError("longctx: a page store without a `path` cannot be saved; give it one")
        self.in_store.keep()
        self.store.commit()
        layers = [
            {**{name: getattr(layer, name) for name in layer.PLAIN}, "lengths": layer.lengths}
            for layer in self.in_store.layers
        ]
        options = {**self.options, "sequences": self.sequences}
        header = {"name": self.name, "options": options, "layers": layers}
        save_file({}, path, {"format": FORMAT, "longctx": json.dumps(header)})

    def restore(self, layers: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        for layer, entry in zip(self.in_store.layers, layers, strict=True):
            if layer.lengths != entry["lengths"]:
                raise ValueError(
                    f"longctx: `store` has {layer.lengths} tokens in the sequences {self.sequences} of this cache; "
                    f"when it was saved it had {entry['lengths']}"
                )
            for name in layer.PLAIN:
                setattr(layer, name, entry[name])
            layer.count_stored()
