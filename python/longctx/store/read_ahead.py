"""Pages that are brought to the host before attention asks for them."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from longctx.store._host import PageFile, PageFileError
from longctx.store.tier import Lanes, Pages, Tier


class ReadAhead:
    """One thread that reads what was wished for from a file into the host's frames, the oldest wish first.

    A wish replaces an earlier one with the same key that has not begun: who falls behind reads what is wanted now. It
    evicts no page that was asked for after `since`, a value of the frames' clock.
    """

    def __init__(self, file: PageFile, host: Tier) -> None:
        self._file = file
        self._host = host
        self._lock = threading.Lock()
        self._wishes: dict[Hashable, tuple[Lanes, Pages, int]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def wish(self, key: Hashable, lanes: Lanes, pages: Pages, since: int) -> None:
        with self._lock:
            self._wishes[key] = lanes, pages, since
            if self._running is not None and not self._running.done():
                return
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="longctx-store")
            self._running = self._thread.submit(self._work)

    def _work(self) -> None:
        while (wish := self._next()) is not None:
            self._read(*wish)

    def _next(self) -> tuple[Lanes, Pages, int] | None:
        with self._lock:
            if not self._wishes:
                self._running = None  # the next wish needs a new run
                return None
            return self._wishes.pop(next(iter(self._wishes)))

    def _read(self, lanes: Lanes, pages: Pages, since: int) -> None:
        table = self._host.frames
        frames = table.acquire_ahead(lanes, pages, since)
        taken = frames >= 0
        frames = frames[taken]
        try:
            self._file.read(lanes[taken], pages[taken], self._host.bytes, frames)
        except PageFileError:
            table.abandon(frames)  # who needs the page reads it again and reports what is wrong
        else:
            table.loaded(frames)
            table.release(frames)

    def forget(self) -> None:
        """Drops wishes that have not begun and waits for the one that has."""
        with self._lock:
            self._wishes.clear()
        self.settle()

    def settle(self) -> None:
        """Waits until no wish is left."""
        running = self._running
        if running is not None:
            running.result()

    def close(self) -> None:
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
