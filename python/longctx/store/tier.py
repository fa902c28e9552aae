"""One tier of a page store in memory: a pool of frames of fixed size, and which page stands in which."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longctx.store._host import FrameTable
from longctx.store.geometry import PageGeometry

Lanes = NDArray[np.int64]
Pages = NDArray[np.int64]
Frames = NDArray[np.int32]

# Frames begin at multiples of this, so that a disk can be read past the page cache.
ALIGNMENT = 4096


class Tier:
    """Frames on one device.

    Attributes:
        frames: which page is where, and which leaves next (`csrc/host/frame_table.h`).
        k, v: `[num_frames, 1, page_size, head_dim or head_dim_v]`: `gather_attention`'s pages.
        bytes: uint8 `[num_frames, page_bytes]`, the same memory; on the CPU only.
    """

    def __init__(self, geometry: PageGeometry, max_bytes: int, device: torch.device) -> None:
        num_frames = max_bytes // geometry.page_bytes
        if num_frames < 1:
            raise ValueError(
                f"longctx: {max_bytes} bytes of memory do not hold one page of {geometry.page_bytes} bytes"
            )
        self.device = device
        self.frames = FrameTable(num_frames, geometry.num_lanes)
        size = num_frames * geometry.page_bytes
        on_host = device.type == "cpu"
        # Pages of this allocation become resident as they are first written, unless they are pinned for DMA.
        flat = torch.empty(
            size + ALIGNMENT, dtype=torch.uint8, device=device, pin_memory=on_host and torch.cuda.is_available()
        )
        flat = flat[-flat.data_ptr() % ALIGNMENT :][:size]
        self.bytes = flat.view(num_frames, geometry.page_bytes).numpy() if on_host else None
        self.pages = flat.view(geometry.dtype).view(num_frames, -1)
        k, v = self.pages.split(
            [geometry.page_size * geometry.head_dim, geometry.page_size * geometry.head_dim_v], dim=1
        )
        self.k = k.unflatten(1, (1, geometry.page_size, geometry.head_dim))
        self.v = v.unflatten(1, (1, geometry.page_size, geometry.head_dim_v))
        self.max_bytes = size

    @property
    def num_frames(self) -> int:
        return int(self.frames.num_frames)

    @property
    def used_bytes(self) -> int:
        return int(self.frames.num_used) * self.pages.shape[1] * self.pages.element_size()

    def resident(self, lanes: Lanes, pages: Pages) -> NDArray[np.bool_]:
        """Which of the pages have a frame."""
        table = self.frames.table
        known = pages < table.shape[1]
        found = np.zeros(len(pages), dtype=bool)
        found[known] = table[lanes[known], pages[known]] >= 0
        return found

    def write_rows(self, frames: Frames, offset: int, k: Tensor, v: Tensor) -> None:
        """Rows of K and V into frames that follow each other.

        Args:
            frames: `[lanes, num_pages]`.
            offset: row of the first page where they begin.
            k, v: `[lanes, num_rows, dim]`.
        """
        page_size = self.k.shape[2]
        where = torch.from_numpy(frames).to(self.device, torch.int64)
        row, page = 0, 0
        while row < k.shape[1]:
            whole = (k.shape[1] - row) // page_size if offset == 0 else 0
            count = whole * page_size if whole else min(page_size - offset, k.shape[1] - row)
            for rows, source in ((self.k[:, 0], k), (self.v[:, 0], v)):
                part = source[:, row : row + count].to(self.device)
                if whole:
                    pages = part.reshape(-1, page_size, part.shape[2])
                    rows.index_copy_(0, where[:, page : page + whole].flatten(), pages)
                else:
                    rows[:, offset : offset + count].index_copy_(0, where[:, page], part)
            row, page, offset = row + count, page + max(whole, 1), 0

    def page_table(self, lanes: Lanes) -> Tensor:
        """int32 `[len(lanes), capacity]`, the frame of each page or -1: the live table, not a copy, on the CPU."""
        rows = torch.from_numpy(self.frames.table[lanes[0] : lanes[-1] + 1])
        return rows.to(self.device, non_blocking=True)
