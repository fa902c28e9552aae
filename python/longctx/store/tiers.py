"""The tiers of a page store together: who has a page, how it is brought, where it is written."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longctx.store._host import NoFrameError, PageFile
from longctx.store.errors import PageStoreError, as_store_error
from longctx.store.geometry import PageGeometry
from longctx.store.read_ahead import ReadAhead
from longctx.store.tier import Frames, Lanes, Pages, Tier


class Tiers:
    """Device, host and disk, as the layers of a store see them.

    Attributes:
        host, device: frames; `device` may be None.
        top: the faster of the two: new tokens are written there, and pinned pages stay there.
        file: the disk; None if there is none, or after `close`.
        selected: of each layer, what the last `attend` of some sequences selected.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        file: PageFile | None,
        *,
        max_host_bytes: int,
        max_device_bytes: int,
        device: torch.device | str,
        num_first_pages: int,
        num_last_pages: int,
        read_ahead: bool,
    ) -> None:
        if num_first_pages < 0 or num_last_pages < 1:
            raise ValueError("longctx: `num_first_pages` must not be negative and `num_last_pages` at least 1")
        self.geometry = geometry
        self.file = file
        self.num_first_pages = num_first_pages
        self.num_last_pages = num_last_pages
        self.host = Tier(geometry, max_host_bytes, torch.device("cpu"))
        self.device = Tier(geometry, max_device_bytes, torch.device(device)) if max_device_bytes > 0 else None
        self.top = self.device if self.device is not None else self.host
        self.ahead = ReadAhead(file, self.host) if read_ahead and file is not None else None
        self.selected: list[dict[range, tuple[Lanes, Pages]]] = [{} for _ in range(geometry.num_layers)]
        self.closed = False
        self.device_hits = 0
        self._process = os.getpid()
        _of_this_process.add(self)

    def __iter__(self) -> Iterator[Tier]:
        yield self.host
        if self.device is not None:
            yield self.device

    # ---- pages that are read ---------------------------------------------------------------------

    @contextlib.contextmanager
    def hold_host(self, lanes: Lanes, pages: Pages) -> Iterator[Frames]:
        """The host frames of the pages, which stay while the block runs; absent ones are read from the disk."""
        frames = self._acquire(lanes, pages)
        try:
            yield frames
        finally:
            self.host.frames.release(frames)

    @contextlib.contextmanager
    def hold_device(self, lanes: Lanes, pages: Pages) -> Iterator[Frames]:
        """The device frames of pages that are there, which stay while the block runs."""
        assert self.device is not None
        frames, _ = self.device.frames.acquire(lanes, pages)
        self.device_hits += len(frames)
        try:
            yield frames
        finally:
            self.device.frames.release(frames)

    def _acquire(self, lanes: Lanes, pages: Pages) -> Frames:
        table = self.host.frames
        while True:
            frames, absent = table.acquire(lanes, pages)
            self._load(lanes, pages, frames, absent)
            if table.wait_loaded(lanes, pages, frames):
                return frames  # type: ignore[no-any-return]
            table.release(frames)  # a read of another thread failed: this one reads for itself

    def _load(self, lanes: Lanes, pages: Pages, frames: Frames, absent: NDArray[np.bool_]) -> None:
        """Fills the frames that are new; if that fails, gives all back."""
        if not absent.any():
            return
        try:
            self.check_open()
            if self.file is None:
                raise PageStoreError(f"longctx: page {pages[absent][0]} is in no tier: the store is closed")
            with as_store_error():
                self.file.read(lanes[absent], pages[absent], self.host.bytes, frames[absent])
        except BaseException:
            self.host.frames.abandon(frames[absent])
            self.host.frames.release(frames[~absent])
            raise
        self.host.frames.loaded(frames[absent])

    def promote(self, lanes: Lanes, pages: Pages, frames: Frames) -> None:
        """Copies pages from host frames to the device, as far as frames are free or evictable there."""
        if self.device is None:
            return
        near = self.device.frames.acquire_ahead(lanes, pages, self.device.frames.clock)
        taken = near >= 0
        self.device.pages[torch.from_numpy(near[taken])] = self.host.pages[torch.from_numpy(frames[taken])].to(
            self.device.device, non_blocking=True
        )
        self.device.frames.loaded(near[taken])
        self.device.frames.release(near[taken])

    def prefetch(self, key: Any, lanes: Lanes, pages: Pages, since: int) -> None:
        """Brings pages to the host in the background, in place of none that was asked for after `since`."""
        if self.ahead is None or self.file is None:
            return
        absent = ~self.host.resident(lanes, pages)
        if self.device is not None:
            absent &= ~self.device.resident(lanes, pages)
        if absent.any():
            most = max(1, self.host.num_frames // 4)
            self.ahead.wish(key, lanes[absent][:most], pages[absent][:most], since)

    # ---- pages that are written ------------------------------------------------------------------

    @property
    def owned(self) -> bool:
        """Whether this is the process that opened the store, not one that was forked from it."""
        return self._process == os.getpid()

    def check_open(self) -> None:
        if self.file is not None and not self.owned:
            raise PageStoreError(
                f"longctx: page file {self.file.path} was opened by the process that this one was forked from; open "
                "it again here, with `writable=False` beside its writer"
            )

    def check_writable(self) -> None:
        self.check_open()
        if self.closed:
            raise PageStoreError("longctx: this page store is closed")
        if self.file is not None and not self.file.writable:
            raise PageStoreError(f"longctx: page file {self.file.path} is open for reading only")

    def place(self, lanes: Lanes, pages: Pages) -> Frames:
        """Frames of the top tier for pages that are about to be written; held and pinned."""
        try:
            return self.top.frames.place(lanes, pages)  # type: ignore[no-any-return]
        except NoFrameError as error:
            raise self.no_room(error) from None

    def no_room(self, error: NoFrameError | str) -> PageStoreError:
        limit = "max_device_bytes" if self.top is self.device else "max_host_bytes"
        remedy = "or a `path` to store pages in" if self.file is None else "or fewer pinned pages"
        return PageStoreError(f"{error}; the store needs more `{limit}` {remedy}")

    def store_full(self, lanes: Lanes, pages: Pages, frames: Frames) -> None:
        """Full pages in frames of the top tier go down to the host and to the disk, not committed yet."""
        if self.top is self.host:
            self._write(lanes, pages, frames)
            return
        below = self._place_on_host(lanes, pages)
        try:
            self.host.pages[torch.from_numpy(below)] = self.top.pages[torch.from_numpy(frames)].to("cpu")
            self._write(lanes, pages, below)
        finally:
            self.host.frames.release(below)
        for lane, page in zip(lanes.tolist(), pages.tolist(), strict=True):
            self.host.frames.set_pinned(lane, page, page + 1, False)
        self.top.frames.set_backed(lanes, pages, True)

    def _place_on_host(self, lanes: Lanes, pages: Pages) -> Frames:
        try:
            return self.host.frames.place(lanes, pages)  # type: ignore[no-any-return]
        except NoFrameError as error:
            raise PageStoreError(f"{error}; the store needs more `max_host_bytes` or a `path`") from None

    def _write(self, lanes: Lanes, pages: Pages, frames: Frames) -> None:
        if self.file is None:
            return
        tokens = np.full(len(pages), self.geometry.page_size, dtype=np.int64)
        with as_store_error():
            self.file.append(lanes, pages, tokens, self.host.bytes, frames)
        self.host.frames.set_backed(lanes, pages, True)

    # ---- lanes -----------------------------------------------------------------------------------

    def drop(self, lanes: Lanes, first_page: int) -> None:
        """Forgets the frames of pages from `first_page` on."""
        if self.ahead is not None:
            self.ahead.forget()
        for tier in self:
            for lane in lanes.tolist():
                tier.frames.drop(lane, first_page)

    def cut(self, lanes: Lanes, num_pages: int) -> None:
        """Leaves the lanes their first `num_pages` pages, as far as they have so many."""
        self.drop(lanes, num_pages)
        if self.file is not None:
            with as_store_error():
                for lane in lanes.tolist():
                    self.file.share(lane, lane, min(num_pages, self.file.num_pages(lane)))

    def share(self, lanes: Lanes, sources: Lanes, num_pages: int) -> int:
        """Gives lanes the first `num_pages` pages, all full, of others; how many they had in common before."""
        self.drop(lanes, num_pages)
        common = num_pages
        for lane, source in zip(lanes.tolist(), sources.tolist(), strict=True):
            common = min(common, *(tier.frames.share(lane, source, num_pages) for tier in self))
            if self.file is not None:
                with as_store_error():
                    self.file.share(lane, source, num_pages)
        return common

    def pin(self, lanes: Lanes, begin: int, end: int, pinned: bool) -> None:
        for lane in lanes.tolist() if begin < end else ():
            self.top.frames.set_pinned(lane, begin, end, pinned)

    def close(self) -> None:
        if self.ahead is not None and self.owned:
            self.ahead.close()
        self.ahead = None
        self.file = None
        self.closed = True


# A child has neither the threads nor a right to the lock: what it inherits it lets go of.
_of_this_process: weakref.WeakSet[Tiers] = weakref.WeakSet()


def _let_go() -> None:
    for tiers in _of_this_process:
        if tiers.file is not None:
            tiers.file.close_in_child()


os.register_at_fork(after_in_child=_let_go)
