"""The tokens of one layer of a page store: how they come in, come back, are taken away and shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longctx.store._host import NoFrameError
from longctx.store.errors import PageStoreError, as_store_error
from longctx.store.selection import Lengths
from longctx.store.summary import PageSummary
from longctx.store.tier import Lanes, Pages
from longctx.store.tiers import Tiers


class StoredTokens:
    """Calls are for all sequences of the store or for some that follow each other (`sequences`, a range).

    Attributes:
        lengths: int64 `[batch]`, tokens of each sequence.
        summary: of its pages, from `summarize` on.
    """

    def __init__(self, tiers: Tiers, index: int) -> None:
        self.tiers = tiers
        self.geometry = tiers.geometry
        self.index = index
        self.lengths: Lengths = np.zeros(self.geometry.batch, dtype=np.int64)
        self.lanes = np.arange(index * self.geometry.lanes_per_layer, (index + 1) * self.geometry.lanes_per_layer)
        self._written = self.lengths.copy()  # tokens in the file, those of a partial page included
        self._all = range(self.geometry.batch)
        self.summary: PageSummary | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    def summarize(self, *, method: Literal["minmax", "mean"] = "minmax", max_tokens: int = 0) -> PageSummary:
        """Keeps summaries of the pages from here on; reads those that are there once."""
        self.summary = PageSummary(self.tiers, self.lanes, method=method, max_tokens=max_tokens)
        for run in self._alike(self._all):
            self._summarize(run, 0)
        return self.summary

    def _summarize(self, run: range, token: int) -> None:
        """Summarizes the pages of a run from that of `token` on."""
        if self.summary is None:
            return
        page_size, length = self.geometry.page_size, int(self.lengths[run.start])
        self.summary.num_pages = self.geometry.num_pages(self.num_tokens)
        step = self._pages_at_once(run) * page_size
        for start in range(token // page_size * page_size, length, step):
            end = min(start + step, length)
            self.summary.take(run, start, end, self.read(start, end, sequences=run)[0])

    def _pages_at_once(self, run: range) -> int:
        """Pages of each lane that may be held at once, so that those of a long prompt can leave for later ones."""
        lanes = len(run) * self.geometry.num_kv_heads
        return max(1, min(tier.num_frames for tier in self.tiers) // (4 * lanes))

    def _lanes(self, sequences: range) -> Lanes:
        heads = self.geometry.num_kv_heads
        return self.lanes[sequences.start * heads : sequences.stop * heads]

    def _alike(self, sequences: range) -> list[range]:
        """As runs of neighbours of one length."""
        lengths = self.lengths[sequences.start : sequences.stop]
        ends = [sequences.start + 1 + int(i) for i in np.flatnonzero(np.diff(lengths))]
        return [range(a, b) for a, b in zip([sequences.start, *ends], [*ends, sequences.stop], strict=True)]

    def _set_length(self, run: range, num_tokens: int) -> None:
        self.lengths[run.start : run.stop] = num_tokens
        if self.summary is not None:
            self.summary.num_pages = self.geometry.num_pages(self.num_tokens)

    # ---- tokens in -------------------------------------------------------------------------------

    def append(
        self, k: Tensor, v: Tensor, *, sequences: range | None = None, skip: Sequence[int] | None = None
    ) -> None:
        """Appends tokens; pages that become full are stored and committed.

        Args:
            k: `[len(sequences), num_kv_heads, num_tokens, head_dim]` in the store's dtype.
            v: `[len(sequences), num_kv_heads, num_tokens, head_dim_v]`.
            skip: of each sequence, how many of the tokens in front are padding and left out.

        Raises:
            ValueError: a shape or dtype is wrong.
            PageStoreError: no room in memory or on the disk; the layer is as it was.
        """
        sequences = self._all if sequences is None else sequences
        self.check_tokens(k, v, len(sequences))
        self.tiers.check_writable()
        skip = [0] * len(sequences) if skip is None else skip
        old, page_size = self.lengths.copy(), self.geometry.page_size
        runs = [
            (part, skip[part.start - sequences.start])
            for run in self._alike(sequences)
            for part in _equal(run, skip[run.start - sequences.start : run.stop - sequences.start])
        ]
        fills = any(old[run.start] // page_size < (old[run.start] + k.shape[2] - s) // page_size for run, s in runs)
        file = self.tiers.file
        mark = -1
        if file is not None and fills:
            with as_store_error():
                mark = file.mark()
        try:
            for run, skipped in runs:
                rows = slice(run.start - sequences.start, run.stop - sequences.start)
                self._append_run(run, k[rows, :, skipped:].flatten(0, 1), v[rows, :, skipped:].flatten(0, 1))
            if file is not None and fills:
                with as_store_error():
                    file.commit(False)
        except BaseException:
            if mark >= 0:
                file.rollback(mark)  # type: ignore[union-attr]
            for run, _ in runs:
                self._undo(run, int(old[run.start]))
            raise
        for run, _ in runs:
            before, full = int(old[run.start]), int(self.lengths[run.start]) // page_size
            if full > before // page_size:
                self._written[run.start : run.stop] = full * page_size
            self._unpin(run, self.geometry.num_pages(before) - self.tiers.num_last_pages, before // page_size + 1)

    def check_tokens(self, k: Tensor, v: Tensor, batch: int) -> None:
        """Raises on what `append` does not take."""
        g = self.geometry
        for name, x, dim in (("k", k, g.head_dim), ("v", v, g.head_dim_v)):
            expected = (batch, g.num_kv_heads, k.shape[2] if k.dim() == 4 else "num_tokens", dim)
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"longctx: `{name}` of a page store must have shape [batch, num_kv_heads, num_tokens, dim] = "
                    f"{list(expected)}; got {list(x.shape)}"
                )
            if x.dtype != g.dtype:
                raise ValueError(f"longctx: `{name}` of this page store must be {g.dtype}; got {x.dtype}")

    def _append_run(self, run: range, k: Tensor, v: Tensor) -> None:
        """Tokens `[lanes, num_tokens, dim]` of sequences of one length."""
        page_size, old = self.geometry.page_size, int(self.lengths[run.start])
        pages_at_once = self._pages_at_once(run)
        begin = 0
        while begin < k.shape[1]:
            first = int(self.lengths[run.start]) // page_size
            end = min(k.shape[1], (first + pages_at_once) * page_size - old)
            self._append_pages(run, k[:, begin:end], v[:, begin:end], keep=old // page_size)
            begin = end

    def _append_pages(self, run: range, k: Tensor, v: Tensor, keep: int) -> None:
        """As many tokens as may be held at once; of the pages before the window, `keep` stays pinned."""
        tiers, page_size, start = self.tiers, self.geometry.page_size, int(self.lengths[run.start])
        end = start + k.shape[1]
        first, last = start // page_size, self.geometry.num_pages(end)
        lanes, pages = _grid(self._lanes(run), first, last)
        frames = tiers.place(lanes, pages)
        try:
            tiers.top.write_rows(frames.reshape(k.shape[0], -1), start - first * page_size, k, v)
            if self.summary is not None:
                self.summary.update(run, start, end)
            full = pages < end // page_size
            if full.any():
                tiers.store_full(lanes[full], pages[full], frames[full])
        finally:
            tiers.top.frames.release(frames)
        self._set_length(run, end)
        self._unpin(run, max(keep + 1, first - tiers.num_last_pages), last - tiers.num_last_pages)

    def _undo(self, run: range, num_tokens: int) -> None:
        """Back to `num_tokens`, after an append that failed and that the file has forgotten."""
        lanes, page_size = self._lanes(run), self.geometry.page_size
        self.tiers.drop(lanes, self.geometry.num_pages(num_tokens))
        self._set_length(run, num_tokens)
        if num_tokens % page_size:  # still there, and again the only copy
            last = np.full(len(lanes), num_tokens // page_size)
            self.tiers.top.frames.release(self.tiers.place(lanes, last))
            self._summarize(run, num_tokens)
        self._pin_window(run)

    # ---- tokens out ------------------------------------------------------------------------------

    def read(self, begin: int, end: int, *, sequences: range | None = None) -> tuple[Tensor, Tensor]:
        """K and V of tokens `[begin, end)`, dense: `[len(sequences), num_kv_heads, n, dim]`, in the top tier."""
        g, tiers = self.geometry, self.tiers
        sequences = self._all if sequences is None else sequences
        shortest = int(self.lengths[sequences.start : sequences.stop].min(initial=self.num_tokens))
        if not 0 <= begin <= end <= shortest:
            raise ValueError(f"longctx: tokens [{begin}, {end}) of a layer with {shortest}")
        tiers.check_open()
        first, last = begin // g.page_size, g.num_pages(end)
        lanes, pages = _grid(self._lanes(sequences), first, last)
        content = torch.empty(len(pages), tiers.top.pages.shape[1], dtype=g.dtype, device=tiers.top.device)
        step = max(1, tiers.host.num_frames // 4)
        for at in range(0, len(pages), step):
            self._copy_pages(lanes[at : at + step], pages[at : at + step], content[at : at + step])
        by_token = content.view(len(sequences), g.num_kv_heads, last - first, content.shape[1])
        k, v = by_token.split([g.page_size * g.head_dim, g.page_size * g.head_dim_v], dim=3)
        cut = slice(begin - first * g.page_size, end - first * g.page_size)
        k, v = (x.unflatten(3, (g.page_size, x.shape[3] // g.page_size)).flatten(2, 3)[:, :, cut] for x in (k, v))
        return k, v

    def _copy_pages(self, lanes: Lanes, pages: Pages, content: Tensor) -> None:
        tiers = self.tiers
        far = np.ones(len(pages), dtype=bool)
        if tiers.device is not None:
            near = tiers.device.resident(lanes, pages)
            far = ~near
            if near.any():
                with tiers.hold_device(lanes[near], pages[near]) as frames:
                    content[torch.from_numpy(near)] = tiers.device.pages[torch.from_numpy(frames)]
        if far.any():
            with tiers.hold_host(lanes[far], pages[far]) as frames:
                content[torch.from_numpy(far)] = tiers.host.pages[torch.from_numpy(frames)].to(content.device)

    def rewind(self, num_tokens: int, *, sequences: range | None = None) -> None:
        """Keeps the first `num_tokens` tokens of each sequence; the file forgets the others at its next commit."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"longctx: cannot rewind a layer of {self.num_tokens} tokens to {num_tokens}")
        for run in self._alike(self._all if sequences is None else sequences):
            if num_tokens < int(self.lengths[run.start]):
                self.tiers.check_writable()
                self._rewind_run(run, num_tokens)

    def _rewind_run(self, run: range, num_tokens: int) -> None:
        full = num_tokens // self.geometry.page_size
        kept = full * self.geometry.page_size
        # Its page may be one that others share: the tokens go to a page of their own.
        k, v = self.read(kept, num_tokens, sequences=run)
        self.tiers.selected[self.index].clear()
        self.tiers.cut(self._lanes(run), full)
        self._set_length(run, kept)
        self._written[run.start : run.stop] = kept
        self._pin_window(run)
        if num_tokens > kept:
            self.append(k, v, sequences=run)

    def share(self, sequence: int, source: int) -> None:
        """Makes a sequence what another one is. Full pages are shared, the last one is copied, summaries too.

        Raises:
            PageStoreError: no frames for the last page; the sequence then ends with the last full page.
        """
        self.tiers.check_writable()
        g, tiers = self.geometry, self.tiers
        num_tokens = int(self.lengths[source])
        full = num_tokens // g.page_size
        own, lanes = (range(one, one + 1) for one in (sequence, source))
        tiers.selected[self.index].clear()
        common = tiers.share(self._lanes(own), self._lanes(lanes), full)
        self._set_length(own, full * g.page_size)
        self._written[sequence] = full * g.page_size
        if self.summary is not None:
            self.summary.copy(sequence, source, common, g.num_pages(num_tokens))
        if num_tokens % g.page_size:
            page = np.full(g.num_kv_heads, full)
            held, _ = tiers.top.frames.acquire(self._lanes(lanes), page)
            try:
                frames = tiers.place(self._lanes(own), page)
                tiers.top.pages[torch.from_numpy(frames)] = tiers.top.pages[torch.from_numpy(held)]
                tiers.top.frames.release(frames)
            finally:
                tiers.top.frames.release(held)
            self._set_length(own, num_tokens)
        self._pin_window(own)

    # ---- the file --------------------------------------------------------------------------------

    def load(self, changed: Lanes | None = None) -> None:
        """Takes over what the file has, and brings the pages that stay in memory.

        Args:
            changed: of each lane of the store, the first page that is not what it was. `None`: everything is new.
        """
        g, tiers = self.geometry, self.tiers
        assert tiers.file is not None
        of_lanes = np.array([tiers.file.num_tokens(lane) for lane in self.lanes.tolist()]).reshape(g.batch, -1)
        if (of_lanes != of_lanes[:, :1]).any():
            raise PageStoreError(
                f"longctx: page file {tiers.file.path} is damaged: kv heads of layer {self.index} differ in length"
            )
        stale = np.zeros_like(of_lanes) if changed is None else changed[self.lanes].reshape(g.batch, -1)
        known = np.minimum(stale.min(axis=1) * g.page_size, self.lengths)
        for sequence in self._all:
            self.tiers.drop(self._lanes(range(sequence, sequence + 1)), int(known[sequence]) // g.page_size)
        self.lengths[:] = of_lanes[:, 0]
        self._written[:] = of_lanes[:, 0]
        self._share_frames()
        for run in self._alike(self._all):
            self._pin_window(run)
            self._summarize(run, int(known[run.start : run.stop].min()))

    def _share_frames(self) -> None:
        """Frames of pages that sequences share in the file serve all of them."""
        file, heads = self.tiers.file, self.geometry.num_kv_heads
        for sequence in self._all[1:]:
            lane = int(self.lanes[sequence * heads])
            shared = [file.num_shared(lane, int(self.lanes[other * heads])) for other in range(sequence)]  # type: ignore[union-attr]
            other = int(np.argmax(shared))
            for head in range(heads) if shared[other] else ():
                for tier in self.tiers:
                    tier.frames.share(lane + head, int(self.lanes[other * heads]) + head, shared[other])

    def write_partial_pages(self) -> None:
        """Writes the tokens of last pages to the file that are not full."""
        g, tiers = self.geometry, self.tiers
        for run in self._alike(self._all):
            length = int(self.lengths[run.start])
            rows = length % g.page_size
            if tiers.file is None or rows == 0 or (self._written[run.start : run.stop] == length).all():
                continue
            lanes = self._lanes(run)
            pages = np.full(len(lanes), length // g.page_size)
            frames, _ = tiers.top.frames.acquire(lanes, pages)
            content = tiers.top.pages[torch.from_numpy(frames)].to("cpu", copy=True)
            tiers.top.frames.release(frames)
            # What lies behind the tokens belongs to nobody.
            k, v = content.split([g.page_size * g.head_dim, g.page_size * g.head_dim_v], dim=1)
            k[:, rows * g.head_dim :] = 0
            v[:, rows * g.head_dim_v :] = 0
            buffer = content.view(torch.uint8).numpy()
            with as_store_error():
                tiers.file.append(lanes, pages, np.full(len(pages), rows), buffer, np.arange(len(pages)))
            self._written[run.start : run.stop] = length

    # ---- pages that stay -------------------------------------------------------------------------

    def _unpin(self, run: range, begin: int, end: int) -> None:
        """Lets go of pages [begin, end), as far as they are neither the first ones nor the last."""
        begin = max(begin, self.tiers.num_first_pages)
        end = min(end, self.geometry.num_pages(int(self.lengths[run.start])) - self.tiers.num_last_pages)
        self.tiers.pin(self._lanes(run), begin, end, False)

    def _pin_window(self, run: range) -> None:
        """Brings the first and the last pages of sequences of one length to the top tier, to stay."""
        tiers = self.tiers
        num_pages = self.geometry.num_pages(int(self.lengths[run.start]))
        first = min(tiers.num_first_pages, num_pages)
        last = max(first, num_pages - tiers.num_last_pages)
        for begin, end in ((0, first), (last, num_pages)):
            lanes, pages = _grid(self._lanes(run), begin, end)
            absent = ~tiers.top.resident(lanes, pages)
            if absent.any():
                try:
                    with tiers.hold_host(lanes[absent], pages[absent]) as frames:
                        tiers.promote(lanes[absent], pages[absent], frames)
                except NoFrameError as error:
                    raise tiers.no_room(error) from None
            if not tiers.top.resident(lanes, pages).all():
                raise tiers.no_room(f"longctx: {len(pages)} first and last pages need a frame of their own")
            tiers.pin(self._lanes(run), begin, end, True)


def _grid(lanes: Lanes, first: int, last: int) -> tuple[Lanes, Pages]:
    """Pages [first, last) of each lane."""
    return np.repeat(lanes, last - first), np.tile(np.arange(first, last), len(lanes))


def _equal(run: range, values: Sequence[int]) -> list[range]:
    """A run in parts of one value."""
    ends = [run.start + i for i in range(1, len(values)) if values[i] != values[i - 1]]
    return [range(a, b) for a, b in zip([run.start, *ends], [*ends, run.stop], strict=True)]
