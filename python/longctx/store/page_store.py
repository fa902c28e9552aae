"""A store of KV pages in three tiers: device, host, disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from longctx.store._host import PageFile
from longctx.store.errors import PageStoreError, as_store_error
from longctx.store.geometry import PageGeometry
from longctx.store.layer import StoreLayer
from longctx.store.selection import Lengths
from longctx.store.sequences import Claim, Sequences
from longctx.store.stats import StoreStats
from longctx.store.tier import Tier
from longctx.store.tiers import Tiers


class PageStore:
    """KV pages of all layers of a model, in bounded memory, read by the indices that a method selected.

    Tokens are appended by layer and become pages (`longctx.store.PageGeometry`). A full page is written to the disk
    and committed, and stays in a frame until others need it: the least recently used page leaves first, the first
    `num_first_pages` (sinks) and the last `num_last_pages` (window) of each lane never. `attend` brings the
    selected pages that are not in memory, reads them in place, and merges what several tiers hold. Sequences differ in
    length, and share full pages (`share`).

    Memory: frames of `max_host_bytes` and `max_device_bytes`, allocated once and never exceeded, plus 5 bytes a
    page and lane of page table (9 when sequences share pages) and 16 of the file's index. The file is read into frames
    and not mapped: a mapped page would count as resident memory without a bound. The kernel's page cache is its own;
    `direct_io` bypasses it.

    Durability: what was committed survives a killed process, in the middle of a write too; `commit(sync=True)` also
    a power cut. Every page has a checksum, compared whenever it is read. One writer at a time; readers (`open(..,
    writable=False)`, in any process) see what was committed after `refresh`. A process that is forked from this one has
    to open the file again. Threads may attend and read side by side; what appends, rewinds, shares or refreshes runs
    alone.

    Args:
        geometry: what a page holds.
        path: file for the disk tier; must not exist (`open` reopens one). `None`: no disk, and appending more than
            the host tier holds raises.
        max_host_bytes: frames in host memory, pinned where torch has a GPU.
        max_device_bytes: frames on `device`; 0: no device tier.
        device: of the device tier.
        num_first_pages, num_last_pages: pages of each lane that never leave their tier.
        read_ahead: after a layer's attention, bring pages in the background: those that the next layer selected last,
            and those that the call names.
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

    def _setup(self, geometry: PageGeometry, file: PageFile | None, **options: Any) -> None:
        self.geometry = geometry
        self.tiers = Tiers(geometry, file, **options)
        self.layers = [StoreLayer(self.tiers, index) for index in range(geometry.num_layers)]
        self._sequences = Sequences(geometry.batch)

    @property
    def file(self) -> PageFile | None:
        return self.tiers.file

    @property
    def host(self) -> Tier:
        return self.tiers.host

    @property
    def device(self) -> Tier | None:
        return self.tiers.device

    @property
    def top(self) -> Tier:
        """The fastest tier, where new tokens are written."""
        return self.tiers.top

    # ---- tokens ----------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has, of the longest sequence."""
        return int(self.lengths.max())

    @property
    def lengths(self) -> Lengths:
        """int64 `[batch]`, tokens of each sequence that every layer has."""
        return np.min([layer.lengths for layer in self.layers], axis=0)  # type: ignore[no-any-return]

    def rewind(self, num_tokens: int | Lengths) -> None:
        """Keeps the first tokens of every sequence, in every layer: as many for all, or int64 `[batch]`."""
        lengths = np.broadcast_to(num_tokens, self.geometry.batch).tolist()
        for layer in self.layers:
            for sequence, length in enumerate(lengths):
                layer.rewind(length, sequences=range(sequence, sequence + 1))

    def commit(self, *, sync: bool = False) -> None:
        """Makes the tokens so far survive this process, those of pages that are not full yet included.

        Full pages are committed as they fill. With `sync` they survive a power cut too.
        """
        self.tiers.check_open()
        if self.file is not None:
            for layer in self.layers:
                layer.write_partial_pages()
            with as_store_error():
                self.file.commit(sync)

    def refresh(self) -> bool:
        """A reader's view of what the writer has committed since; says whether there was anything."""
        self.tiers.check_open()
        if self.file is None:
            return False
        self.settle()
        with as_store_error():
            changed = self.file.refresh()
        if not len(changed):
            return False
        for layer in self.layers:
            layer.load(changed)
        return True

    def settle(self) -> None:
        """Waits for pages that are being brought in the background."""
        if self.tiers.ahead is not None:
            self.tiers.ahead.settle()

    def close(self, *, commit: bool = True) -> None:
        """Commits the pages that are not full yet too, and closes the file for another writer. Twice is once.

        If there is no room for them on the disk, the store stays open: make room, or close without `commit`.
        """
        if commit and self.tiers.owned and self.file is not None and self.file.writable:
            self._empty_abandoned()
            self.commit()
        self.tiers.close()

    def __enter__(self) -> PageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(commit=kind is None)

    # ---- sequences -------------------------------------------------------------------------------

    def claim(self, sequences: Sequence[int], *, temporary: bool = False) -> Claim:
        """Hands sequences to one cache; a cache that had them has them no longer.

        With `temporary` they are emptied when the claim is gone: those of a fork.
        """
        return self._sequences.claim(sequences, temporary=temporary)

    def unused(self, count: int) -> list[int]:
        """Sequences without tokens that no cache has, neighbours if there are such.

        Raises:
            PageStoreError: there are too few.
        """
        self._empty_abandoned()
        free = [s for s in self._sequences.free() if not any(layer.lengths[s] for layer in self.layers)]
        if len(free) < count:
            raise PageStoreError(
                f"longctx: {count} more sequences are needed; the page store was made for {self.geometry.batch} "
                f"(`batch` of its geometry), of which {len(free)} are free"
            )
        for first in free:
            if all(first + i in free for i in range(count)):
                return list(range(first, first + count))
        return free[:count]

    def with_tokens(self) -> list[int]:
        """Sequences that hold tokens and belong to no fork."""
        self._empty_abandoned()
        lengths = self.lengths
        return [s for s in range(self.geometry.batch) if lengths[s] and not self._sequences.is_temporary(s)]

    def share(self, copies: Sequence[tuple[int, int]]) -> None:
        """Makes sequences what others are: `(sequence, source)` each. Full pages are stored once.

        Raises:
            PageStoreError: no frames for pages that are not full; nothing has changed.
        """
        g, top = self.geometry, self.top.frames
        partial = sum(bool(layer.lengths[source] % g.page_size) for layer in self.layers for _, source in copies)
        if partial * g.num_kv_heads > top.num_available:
            raise self.tiers.no_room(
                f"longctx: {partial * g.num_kv_heads} pages that are not full need a frame of their own"
            )
        for sequence, source in copies:
            for layer in self.layers:
                layer.share(sequence, source)

    def empty(self, sequences: Sequence[int]) -> None:
        """Forgets all tokens of sequences."""
        for layer in self.layers:
            for sequence in sequences:
                layer.rewind(0, sequences=range(sequence, sequence + 1))

    def _empty_abandoned(self) -> None:
        self.empty(self._sequences.take_abandoned())

    # ---- numbers ---------------------------------------------------------------------------------

    @property
    def stats(self) -> StoreStats:
        host = self.host.frames.stats
        return StoreStats(
            device_hits=self.tiers.device_hits,
            host_hits=host["hits"],
            misses=host["misses"],
            read_ahead=host["read_ahead"],
            read_ahead_hits=host["read_ahead_hits"],
            read_ahead_unused=host["read_ahead_unused"],
            evictions=host["evictions"],
            bytes_read=self.file.bytes_read if self.file is not None else 0,
            bytes_written=self.file.bytes_written if self.file is not None else 0,
            device_bytes=self.device.used_bytes if self.device is not None else 0,
            host_bytes=self.host.used_bytes,
        )

    def reset_stats(self) -> None:
        """Counts hits, misses and evictions from here."""
        self.host.frames.reset_stats()
        self.tiers.device_hits = 0
