"""A store of KV pages in three tiers: device, host, disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from longctx.store._host import NoFrameError, PageFile, PageFileError
from longctx.store.errors import PageStoreError, as_store_error
from longctx.store.geometry import PageGeometry
from longctx.store.layer import StoreLayer
from longctx.store.stats import StoreStats
from longctx.store.tier import Frames, Lanes, Pages, Tier


class PageStore:
    """KV pages of all layers of a model, in bounded memory, read by the indices that a method selected.

    Tokens are appended by layer and become pages (`longctx.store.PageGeometry`). A full page is written to the disk
    and committed, and stays in a frame until others need it: the least recently used page leaves first, the first
    `num_first_pages` (sinks) and the last `num_last_pages` (window) of each lane never. `attend` brings the
    selected pages that are not in memory, reads them in place, and merges what several tiers hold.

    Memory: frames of `max_host_bytes` and `max_device_bytes`, allocated once and never exceeded, plus 4 bytes a
    page and lane of page table and 16 of the file's index. The file is read into frames and not mapped: a mapped page
    would count as resident memory without a bound. The kernel's page cache is its own; `direct_io` bypasses it.

    Durability: what was committed survives a killed process, in the middle of a write too; `commit(sync=True)` also
    a power cut. Every page has a checksum, compared whenever it is read. One writer at a time; readers (`open(..,
    writable=False)`, in any process) see what was committed after `refresh`.

    Args:
        geometry: what a page holds.
        path: file for the disk tier; must not exist (`open` reopens one). `None`: no disk, and appending more than
            the host tier holds raises.
        max_host_bytes: frames in host memory, pinned where torch has a GPU.
        max_device_bytes: frames on `device`; 0: no device tier.
        device: of the device tier.
        num_first_pages, num_last_pages: pages of each lane that never leave their tier.
        read_ahead: after a layer's attention, bring the pages that the next layer selected last in the background.
        direct_io: read the disk past the page cache; needs pages of a multiple of 4096 bytes.
        overwrite: replace a file that is there.

    Raises:
        PageStoreError: the file exists, is locked, damaged or has another geometry, or there is no room.

    Example:
        >>> import tempfile, torch
        >>> from longctx.store import PageGeometry, PageStore
        >>> geometry = PageGeometry(num_layers=2, num_kv_heads=2, head_dim=16, page_size=8, dtype=torch.float32)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with PageStore(geometry, path=f"{directory}/kv", max_host_bytes=64 * geometry.page_bytes) as store:
        ...         for layer in store.layers:
        ...             layer.append(torch.randn(1, 2, 1000, 16), torch.randn(1, 2, 1000, 16))
        ...         pages = torch.tensor([3, 50, 99], dtype=torch.int32).expand(1, 2, 1, 3)
        ...         out, lse = store.layers[0].attend(torch.randn(1, 4, 1, 16), pages, num_first=8, num_last=16)
        ...         print(out.shape, store.stats.misses > 0)
        torch.Size([1, 4, 1, 16]) True
    """

    def __init__(
        self,
        geometry: PageGeometry,
        *,
        path: str | os.PathLike[str] | None = None,
        max_host_bytes: int,
        max_device_bytes: int = 0,
        device: torch.device | str = "cuda",
        num_first_pages: int = 1,
        num_last_pages: int = 2,
        read_ahead: bool = True,
        direct_io: bool = False,
        overwrite: bool = False,
    ) -> None:
        file = None
        if path is not None:
            with as_store_error():
                file = PageFile.create(os.fspath(path), geometry.to_file(), overwrite=overwrite, direct=direct_io)
        self._setup(
            geometry,
            file,
            max_host_bytes=max_host_bytes,
            max_device_bytes=max_device_bytes,
            device=device,
            num_first_pages=num_first_pages,
            num_last_pages=num_last_pages,
            read_ahead=read_ahead,
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        geometry: PageGeometry | None = None,
        *,
        max_host_bytes: int,
        max_device_bytes: int = 0,
        device: torch.device | str = "cuda",
        num_first_pages: int = 1,
        num_last_pages: int = 2,
        read_ahead: bool = True,
        direct_io: bool = False,
        writable: bool = True,
        verify: bool = True,
    ) -> PageStore:
        """Reopens a file with every page that was committed.

        Args:
            path: the file.
            geometry: what the caller expects; another one raises. `None`: whatever the file has.
            writable: append too; one process at a time.
            verify: read every page and compare its checksum before anything else, so that a damaged file is refused
                here. False: pages are checked when they are first read.

        The other arguments are those of the constructor. A writer that died between two layers leaves layers of
        different lengths: `num_tokens` is what all have, `rewind` makes them equal.
        """
        with as_store_error():
            file = PageFile.open(os.fspath(path), writable=writable, direct=direct_io)
            if verify:
                file.verify()
        found = PageGeometry.from_file(file.geometry)
        if geometry is not None and (different := geometry.differences(found)):
            raise PageStoreError(f"longctx: page file {os.fspath(path)} has another geometry: {different}")
        store = cls.__new__(cls)
        store._setup(
            found,
            file,
            max_host_bytes=max_host_bytes,
            max_device_bytes=max_device_bytes,
            device=device,
            num_first_pages=num_first_pages,
            num_last_pages=num_last_pages,
            read_ahead=read_ahead,
        )
        for layer in store.layers:
            layer.load()
        return store

    def _setup(
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
        self.tiers = [self.host] if self.device is None else [self.host, self.device]
        # New tokens are written to the fastest tier; pinned pages stay there.
        self.top = self.device if self.device is not None else self.host
        self.layers = [StoreLayer(self, index) for index in range(geometry.num_layers)]
        self.read_ahead = read_ahead
        self._reader: ThreadPoolExecutor | None = None
        self._reading: Future[None] | None = None
        self.closed = False
        self._device_hits = 0

    # ---- tokens ----------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has."""
        return min(layer.num_tokens for layer in self.layers)

    def rewind(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens of every layer."""
        for layer in self.layers:
            layer.rewind(num_tokens)

    def commit(self, *, sync: bool = False) -> None:
        """Makes the tokens so far survive this process, those of pages that are not full yet included.

        Full pages are committed as they fill. With `sync` they survive a power cut too.
        """
        if self.file is not None:
            for layer in self.layers:
                layer.write_partial_page()
            with as_store_error():
                self.file.commit(sync)

    def refresh(self) -> bool:
        """A reader's view of what the writer has committed since; says whether there was anything."""
        if self.file is None or not self.file.refresh():
            return False
        for layer in self.layers:
            layer.load()
        return True

    def close(self, *, commit: bool = True) -> None:
        """Commits the pages that are not full yet too, and closes the file for another writer."""
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None
        if commit and self.file is not None and self.file.writable:
            self.commit()
        self.file = None
        self.closed = True

    def __enter__(self) -> PageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(commit=kind is None)

    @property
    def stats(self) -> StoreStats:
        host = self.host.frames.stats
        return StoreStats(
            device_hits=self._device_hits,
            host_hits=host["hits"],
            misses=host["misses"],
            read_ahead=host["read_ahead"],
            evictions=host["evictions"],
            bytes_read=self.file.bytes_read if self.file is not None else 0,
            bytes_written=self.file.bytes_written if self.file is not None else 0,
            device_bytes=self.device.used_bytes if self.device is not None else 0,
            host_bytes=self.host.used_bytes,
        )

    def reset_stats(self) -> None:
        """Counts hits, misses and evictions from here."""
        self.host.frames.reset_stats()
        self._device_hits = 0

    # ---- pages: what layers are made of ----------------------------------------------------------

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
        self._device_hits += len(frames)
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
            if self.file is None:
                raise PageStoreError(f"longctx: page {pages[absent][0]} is in no tier: the store is closed")
            with as_store_error():
                self.file.read(lanes[absent], pages[absent], self.host.bytes, frames[absent])
        except BaseException:
            self.host.frames.abandon(frames[absent])
            self.host.frames.release(frames[~absent])
            raise
        self.host.frames.loaded(frames[absent])

    def settle(self) -> None:
        """Waits for pages that are being brought in the background."""
        if self._reading is not None:
            self._reading.result()

    def prefetch(self, lanes: Lanes, pages: Pages) -> None:
        """Brings pages to the host in the background; nothing if it is still bringing others."""
        if self.file is None or (self._reading is not None and not self._reading.done()):
            return
        absent = ~self.host.resident(lanes, pages)
        if self.device is not None:
            absent &= ~self.device.resident(lanes, pages)
        absent[self.host.num_frames // 4 :] = False
        if not absent.any():
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="longctx-store")
        self._reading = self._reader.submit(self._read_ahead, lanes[absent], pages[absent])

    def _read_ahead(self, lanes: Lanes, pages: Pages) -> None:
        table = self.host.frames
        frames = table.acquire_ahead(lanes, pages)
        taken = frames >= 0
        frames = frames[taken]
        try:
            assert self.file is not None
            self.file.read(lanes[taken], pages[taken], self.host.bytes, frames)
        except PageFileError:
            table.abandon(frames)  # who needs the page reads it again and reports what is wrong
        else:
            table.loaded(frames)
            table.release(frames)

    def promote(self, lanes: Lanes, pages: Pages, frames: Frames) -> None:
        """Copies pages from host frames to the device, as far as frames are free or evictable there."""
        if self.device is None:
            return
        near = self.device.frames.acquire_ahead(lanes, pages)
        taken = near >= 0
        self.device.pages[torch.from_numpy(near[taken])] = self.host.pages[torch.from_numpy(frames[taken])].to(
            self.device.device, non_blocking=True
        )
        self.device.frames.loaded(near[taken])
        self.device.frames.release(near[taken])

    def check_writable(self) -> None:
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

    def no_room(self, error: NoFrameError) -> PageStoreError:
        limit = "max_device_bytes" if self.top is self.device else "max_host_bytes"
        remedy = "or a `path` to store pages in" if self.file is None else "or fewer pinned pages"
        return PageStoreError(f"{error}; the store needs more `{limit}` {remedy}")

    def store_full(self, lanes: Lanes, pages: Pages, frames: Frames) -> None:
        """Full pages in frames of the top tier go down to the host and to the disk, not committed yet."""
        if self.top is not self.host:
            below = self._place_on_host(lanes, pages)
            try:
                self.host.pages[torch.from_numpy(below)] = self.top.pages[torch.from_numpy(frames)].to("cpu")
                self._write(lanes, pages, below)
            finally:
                self.host.frames.release(below)
            for lane, page in zip(lanes.tolist(), pages.tolist(), strict=True):
                self.host.frames.set_pinned(lane, page, page + 1, False)
            self.top.frames.set_backed(lanes, pages, True)
        else:
            self._write(lanes, pages, frames)

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
