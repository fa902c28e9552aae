"""One layer of a page store: tokens in, attention over selected pages out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from longctx.store._host import NoFrameError
from longctx.store.attend import TierPart, attend_part, merge_parts
from longctx.store.errors import PageStoreError, as_store_error
from longctx.store.summary import PageSummary
from longctx.store.tier import Frames, Lanes, Pages, Tier

if TYPE_CHECKING:
    from longctx.store.page_store import PageStore


class StoreLayer:
    """What a cache layer needs: `append`, `attend`, `read`, `rewind`.

    Attributes:
        num_tokens: tokens of each sequence; all have as many.
        summary: of its pages, from `summarize` on.
    """

    def __init__(self, store: PageStore, index: int) -> None:
        self.store = store
        self.index = index
        self.num_tokens = 0
        count = store.geometry.lanes_per_layer
        self.lanes = np.arange(index * count, (index + 1) * count)
        self._written_tokens = 0  # of them in the file, a partial page included
        self._selection: tuple[Lanes, Pages] | None = None  # of the last `attend`
        self.summary: PageSummary | None = None

    def summarize(self, *, method: Literal["minmax", "mean"] = "minmax", max_tokens: int = 0) -> PageSummary:
        """Keeps summaries of the pages from here on; reads those that are there once."""
        self.summary = PageSummary(self, method=method, max_tokens=max_tokens)
        self._summarize_from(0)
        return self.summary

    def _summarize_from(self, token: int) -> None:
        if self.summary is None:
            return
        step = self._pages_at_once() * self.store.geometry.page_size
        begin = token // self.store.geometry.page_size * self.store.geometry.page_size
        for start in range(begin, self.num_tokens, step):
            end = min(start + step, self.num_tokens)
            self.summary.take(start, end, self.read(start, end)[0])

    def _pages_at_once(self) -> int:
        """Pages of each lane that may be held at once, so that those of a long prompt can leave for later ones."""
        return max(1, min(tier.num_frames for tier in self.store.tiers) // (4 * len(self.lanes)))

    # ---- tokens in -------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Appends tokens; pages that become full are stored and committed.

        Args:
            k: `[batch, num_kv_heads, num_tokens, head_dim]` in the store's dtype.
            v: `[batch, num_kv_heads, num_tokens, head_dim_v]`.

        Raises:
            ValueError: a shape or dtype is wrong.
            PageStoreError: no room in memory or on the disk; the layer is as it was.
        """
        self.check_tokens(k, v)
        store, old = self.store, self.num_tokens
        page_size = store.geometry.page_size
        store.check_writable()
        flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
        pages_at_once = self._pages_at_once()
        try:
            while (begin := self.num_tokens - old) < k.shape[2]:
                first = self.num_tokens // page_size
                end = min(k.shape[2], (first + pages_at_once) * page_size - old)
                self._append_pages(flat_k[:, begin:end], flat_v[:, begin:end], keep=old // page_size)
            if store.file is not None and self.num_tokens // page_size > old // page_size:
                with as_store_error():
                    store.file.commit(False)
                self._written_tokens = self.num_tokens // page_size * page_size
        except BaseException:
            self._undo(old)
            raise
        self._unpin(store.geometry.num_pages(old) - store.num_last_pages, old // page_size + 1)

    def check_tokens(self, k: Tensor, v: Tensor) -> None:
        """Raises on what `append` does not take."""
        g = self.store.geometry
        for name, x, dim in (("k", k, g.head_dim), ("v", v, g.head_dim_v)):
            expected = (g.batch, g.num_kv_heads, k.shape[2] if k.dim() == 4 else "num_tokens", dim)
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"longctx: `{name}` of a page store must have shape [batch, num_kv_heads, num_tokens, dim] = "
                    f"{list(expected)}; got {list(x.shape)}"
                )
            if x.dtype != g.dtype:
                raise ValueError(f"longctx: `{name}` of this page store must be {g.dtype}; got {x.dtype}")

    def _append_pages(self, k: Tensor, v: Tensor, keep: int) -> None:
        """Tokens `[lanes, num_tokens, dim]` into pages; of the pages before the window, `keep` stays pinned."""
        store, page_size = self.store, self.store.geometry.page_size
        start, end = self.num_tokens, self.num_tokens + k.shape[1]
        first, last = start // page_size, store.geometry.num_pages(end)
        lanes, pages = self._grid(first, last)
        frames = store.place(lanes, pages)
        try:
            store.top.write_rows(frames.reshape(len(self.lanes), -1), start - first * page_size, k, v)
            if self.summary is not None:
                self.summary.update(start, end)
            full = pages < end // page_size
            if full.any():
                store.store_full(lanes[full], pages[full], frames[full])
        finally:
            store.top.frames.release(frames)
        self.num_tokens = end
        self._unpin(max(keep + 1, first - store.num_last_pages), last - store.num_last_pages)

    def _undo(self, num_tokens: int) -> None:
        """Back to `num_tokens`, after an append that failed."""
        store, page_size = self.store, self.store.geometry.page_size
        if store.file is not None:
            store.file.rollback()
        self._drop(store.geometry.num_pages(num_tokens))
        self.num_tokens = num_tokens
        if num_tokens % page_size:  # still there, and again the only copy
            last = np.full(len(self.lanes), num_tokens // page_size)
            store.top.frames.release(store.place(self.lanes, last))
            self._summarize_from(num_tokens)
        self._pin_window()

    # ---- attention -------------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        indices: Tensor,
        counts: Tensor | None = None,
        *,
        block_size_k: int | None = None,
        num_first: int = 0,
        num_last: int = 0,
        bias: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """`gather_attention` over this layer's tokens, wherever they are.

        Selected pages on the device are attended to there, the others on the host, where absent ones are read from the
        disk first; the parts are merged, and what the host attended to is copied to the device for the next step. A
        selection that does not fit in memory is read and attended to in pieces.

        Args:
            q: `[batch, num_q_heads, seqlen_q, head_dim]`; its last token is the last one appended.
            indices, counts, bias: as in `gather_attention`, entries of `block_size_k` tokens; heads 1, `num_kv_heads`
                or `num_q_heads`.
            block_size_k: tokens of an entry; divides the store's page size, which is the default.
            num_first, num_last, softmax_scale, softcap: as in `gather_attention`.

        Returns:
            `(out [batch, num_q_heads, seqlen_q, head_dim_v], lse [batch, num_q_heads, seqlen_q])`.

        The selection is read on the host, one synchronisation with the GPU: what to bring is decided there.
        """
        store, g = self.store, self.store.geometry
        block = g.page_size if block_size_k is None else block_size_k
        if block < 1 or g.page_size % block:
            raise ValueError(f"longctx: `block_size_k` must divide the page size {g.page_size}; got {block}")
        group = self._group(q)
        if indices.shape[1] not in (1, g.num_kv_heads, q.shape[1]):
            raise ValueError(
                "longctx: `indices` must have 1, num_kv_heads or num_q_heads heads; "
                f"got {list(indices.shape)} for {q.shape[1]} query and {g.num_kv_heads} kv heads"
            )
        # A lane is a batch entry with one kv head: so lanes have page tables of their own.
        lane_indices = self._by_lane(indices)
        lane_counts = None if counts is None else self._by_lane(counts)
        lane_q = q.reshape(len(self.lanes), group, q.shape[2], q.shape[3])
        selection = self._selected_pages(lane_indices, lane_counts, block, num_first, num_last, q.shape[2])
        options = {
            "bias": None if bias is None else self._by_lane(bias),
            "block_size_k": block,
            "num_first": num_first,
            "num_last": num_last,
            "seqused_k": torch.full((len(self.lanes),), self.num_tokens, dtype=torch.int32),
            "softmax_scale": softmax_scale,
            "softcap": softcap,
        }
        states = self._attend_pages(lane_q, *selection, lane_indices, lane_counts, options)
        self._selection = selection
        if store.read_ahead:
            following = store.layers[(self.index + 1) % len(store.layers)]
            if following._selection is not None:
                store.prefetch(*following._selection)
        out, lse = merge_parts(states, lane_q)
        shape = q.shape[:3]
        return out.reshape(*shape, g.head_dim_v), lse.reshape(shape)

    def _group(self, q: Tensor) -> int:
        g = self.store.geometry
        if q.dim() != 4 or q.shape[0] != g.batch or q.shape[1] % g.num_kv_heads or q.shape[3] != g.head_dim:
            raise ValueError(
                f"longctx: `q` must have shape [batch, num_q_heads, seqlen_q, head_dim] = [{g.batch}, a multiple of "
                f"{g.num_kv_heads}, *, {g.head_dim}]; got {list(q.shape)}"
            )
        return q.shape[1] // g.num_kv_heads

    def _by_lane(self, x: Tensor) -> Tensor:
        """`[batch, heads, ..]` as `[lanes, heads of a lane, ..]`."""
        num_kv_heads = self.store.geometry.num_kv_heads
        if x.shape[1] == 1:
            x = x.expand(-1, num_kv_heads, *x.shape[2:])
        return x.reshape(len(self.lanes), x.shape[1] // num_kv_heads, *x.shape[2:])

    def _selected_pages(
        self, indices: Tensor, counts: Tensor | None, block: int, num_first: int, num_last: int, seqlen_q: int
    ) -> tuple[Lanes, Pages]:
        """The pages that a call reads, by lane and ascending."""
        page_size, num_pages = self.store.geometry.page_size, self.store.geometry.num_pages(self.num_tokens)
        entries = indices.cpu().numpy()
        pages = entries.astype(np.int64) * block // page_size
        listed = (entries >= 0) & (pages < num_pages)
        if counts is not None:
            listed &= np.arange(entries.shape[-1]) < counts.cpu().numpy()[..., None]
        forced = [np.arange(-(-min(num_first, self.num_tokens) // page_size))]
        if num_last > 0:
            forced.append(np.arange(max(0, self.num_tokens - seqlen_q + 1 - num_last) // page_size, num_pages))
        # One number a page: lanes one after the other.
        begins = np.arange(len(self.lanes)) * num_pages
        chosen = (pages + begins.reshape(-1, 1, 1, 1))[listed]
        needed = np.unique(np.concatenate([chosen, np.add.outer(begins, np.concatenate(forced)).ravel()]))
        if num_pages == 0:
            return needed, needed
        return needed // num_pages + self.lanes[0], needed % num_pages

    def _attend_pages(
        self, q: Tensor, lanes: Lanes, pages: Pages, indices: Tensor, counts: Tensor | None, options: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        store = self.store
        states = []
        if store.device is None:
            with contextlib.suppress(NoFrameError), store.hold_host(lanes, pages):
                # The live table: of other pages nothing is read.
                part = TierPart(store.host.k, store.host.v, store.host.page_table(self.lanes))
                return [attend_part(q, part, indices, counts, **options)]
        else:
            near = store.device.resident(lanes, pages)
            if near.any():
                with store.hold_device(lanes[near], pages[near]) as frames:
                    part = self._part(store.device, lanes[near], pages[near], frames)
                    states.append(attend_part(q, part, indices, counts, **options))
            lanes, pages = lanes[~near], pages[~near]
        pieces = [(lanes, pages)] if len(pages) or not states else []
        while pieces:
            lanes, pages = pieces.pop()
            try:
                with store.hold_host(lanes, pages) as frames:
                    part = self._part(store.host, lanes, pages, frames)
                    states.append(attend_part(q, part, indices, counts, **options))
                    store.promote(lanes, pages, frames)
            except NoFrameError as error:
                if len(pages) == 1:
                    raise store.no_room(error) from None
                half = len(pages) // 2
                pieces += [(lanes[half:], pages[half:]), (lanes[:half], pages[:half])]
        return states

    def _part(self, tier: Tier, lanes: Lanes, pages: Pages, frames: Frames) -> TierPart:
        """These pages and no others."""
        table = np.full((len(self.lanes), self.store.geometry.num_pages(self.num_tokens)), -1, dtype=np.int32)
        table[lanes - self.lanes[0], pages] = frames
        return TierPart(tier.k, tier.v, torch.from_numpy(table).to(tier.device))

    @contextlib.contextmanager
    def fetch(self, pages: Tensor) -> Iterator[TierPart]:
        """Brings pages to the host and holds them there while the block runs.

        Args:
            pages: int `[batch, 1 or num_kv_heads, n]`; negative ones are skipped.

        Yields:
            frames and page table for `gather_attention`, whose batch is the layer's lanes: q as `[batch * num_kv_heads,
            group_size, seqlen_q, head_dim]`, one kv head.
        """
        chosen = self._selected_pages(
            self._by_lane(pages.unsqueeze(2)), None, self.store.geometry.page_size, 0, 0, seqlen_q=1
        )
        with self.store.hold_host(*chosen) as frames:
            yield self._part(self.store.host, *chosen, frames)

    # ---- tokens out ------------------------------------------------------------------------------

    def read(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V of tokens `[begin, end)`, dense: `[batch, num_kv_heads, end - begin, dim]`, where new tokens go."""
        g, store = self.store.geometry, self.store
        if not 0 <= begin <= end <= self.num_tokens:
            raise ValueError(f"longctx: tokens [{begin}, {end}) of a layer with {self.num_tokens}")
        first, last = begin // g.page_size, g.num_pages(end)
        lanes, pages = self._grid(first, last)
        content = torch.empty(len(pages), store.top.pages.shape[1], dtype=g.dtype, device=store.top.device)
        step = max(1, store.host.num_frames // 4)
        for at in range(0, len(pages), step):
            self._copy_pages(lanes[at : at + step], pages[at : at + step], content[at : at + step])
        by_token = content.view(g.batch, g.num_kv_heads, last - first, content.shape[1])
        k, v = by_token.split([g.page_size * g.head_dim, g.page_size * g.head_dim_v], dim=3)
        cut = slice(begin - first * g.page_size, end - first * g.page_size)
        k, v = (x.unflatten(3, (g.page_size, x.shape[3] // g.page_size)).flatten(2, 3)[:, :, cut] for x in (k, v))
        return k, v

    def _copy_pages(self, lanes: Lanes, pages: Pages, content: Tensor) -> None:
        store = self.store
        far = np.ones(len(pages), dtype=bool)
        if store.device is not None:
            near = store.device.resident(lanes, pages)
            far = ~near
            if near.any():
                with store.hold_device(lanes[near], pages[near]) as frames:
                    content[torch.from_numpy(near)] = store.device.pages[torch.from_numpy(frames)]
        if far.any():
            with store.hold_host(lanes[far], pages[far]) as frames:
                content[torch.from_numpy(far)] = store.host.pages[torch.from_numpy(frames)].to(content.device)

    def rewind(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"longctx: cannot rewind a layer of {self.num_tokens} tokens to {num_tokens}")
        if num_tokens == self.num_tokens:
            return
        self.store.check_writable()
        page_size = self.store.geometry.page_size
        full = num_tokens // page_size
        k, v = self.read(full * page_size, num_tokens)
        if self.store.file is not None:
            with as_store_error():
                for lane in self.lanes.tolist():
                    self.store.file.cut(lane, min(full, self.store.file.num_pages(lane)))
                self.store.file.commit(False)
        self._drop(full)
        self.num_tokens = self._written_tokens = full * page_size
        self._selection = None
        self._pin_window()
        if num_tokens > self.num_tokens:
            self.append(k, v)

    # ---- pages that stay -------------------------------------------------------------------------

    def load(self) -> None:
        """Takes over what the file has, and brings the pages that stay in memory."""
        store = self.store
        assert store.file is not None
        counts = {store.file.num_tokens(lane) for lane in self.lanes.tolist()}
        if len(counts) != 1:
            raise PageStoreError(
                f"longctx: page file {store.file.path} is damaged: sequences of layer {self.index} differ in length"
            )
        # A partial page may have been replaced by a fuller one.
        known = min(self.num_tokens, *counts)
        self._drop(known // store.geometry.page_size)
        self.num_tokens = self._written_tokens = counts.pop()
        self._pin_window()
        self._summarize_from(known)

    def write_partial_page(self) -> None:
        """Writes the tokens of the last page to the file if it is not full."""
        store, g = self.store, self.store.geometry
        rows = self.num_tokens % g.page_size
        if store.file is None or rows == 0 or self._written_tokens == self.num_tokens:
            return
        pages = np.full(len(self.lanes), self.num_tokens // g.page_size)
        frames, _ = store.top.frames.acquire(self.lanes, pages)
        content = store.top.pages[torch.from_numpy(frames)].to("cpu", copy=True)
        store.top.frames.release(frames)
        # What lies behind the tokens belongs to nobody.
        k, v = content.split([g.page_size * g.head_dim, g.page_size * g.head_dim_v], dim=1)
        k[:, rows * g.head_dim :] = 0
        v[:, rows * g.head_dim_v :] = 0
        buffer = content.view(torch.uint8).numpy()
        with as_store_error():
            store.file.append(self.lanes, pages, np.full(len(pages), rows), buffer, np.arange(len(pages)))
        self._written_tokens = self.num_tokens

    def _grid(self, first: int, last: int) -> tuple[Lanes, Pages]:
        """Pages [first, last) of each lane."""
        return np.repeat(self.lanes, last - first), np.tile(np.arange(first, last), len(self.lanes))

    def _unpin(self, begin: int, end: int) -> None:
        """Lets go of pages [begin, end), as far as they are neither the first ones nor the last."""
        store = self.store
        begin = max(begin, store.num_first_pages)
        end = min(end, store.geometry.num_pages(self.num_tokens) - store.num_last_pages)
        if begin < end:
            for lane in self.lanes.tolist():
                store.top.frames.set_pinned(lane, begin, end, False)

    def _drop(self, first_page: int) -> None:
        self.store.settle()
        for tier in self.store.tiers:
            for lane in self.lanes.tolist():
                tier.frames.drop(lane, first_page)

    def _pin_window(self) -> None:
        """Brings the first and the last pages to the top tier, to stay."""
        store = self.store
        num_pages = store.geometry.num_pages(self.num_tokens)
        first = min(store.num_first_pages, num_pages)
        last = max(first, num_pages - store.num_last_pages)
        for begin, end in ((0, first), (last, num_pages)):
            lanes, pages = self._grid(begin, end)
            absent = ~store.top.resident(lanes, pages)
            if absent.any():
                try:
                    with store.hold_host(lanes[absent], pages[absent]) as frames:
                        store.promote(lanes[absent], pages[absent], frames)
                except NoFrameError as error:
                    raise store.no_room(error) from None
            for lane in self.lanes.tolist():
                store.top.frames.set_pinned(lane, begin, end, True)
