"""Memory on huge pages: what it holds is what was written, and the kernel was asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longctx.cache.huge_pages import ADVICE, HUGE_PAGE, on_huge_pages
from longctx.cache.storage import Storage


def advised(address: int) -> bool:
    """Whether the mapping of `address` asks for huge pages: flag hg of its VmFlags."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return " hg" in line
    raise AssertionError(f"no mapping holds {address:x}")


def test_contents_are_what_is_written() -> None:
    for nbytes in (0, 1, HUGE_PAGE - 1, 5 * HUGE_PAGE + 3):
        for _ in range(2):  # the second may get memory that was used
            tensor = on_huge_pages(torch.empty(nbytes, dtype=torch.uint8)).fill_(7)
            assert (tensor == 7).all()


@pytest.mark.skipif(not ADVICE or not Path("/proc/self/smaps").exists(), reason="this kernel takes no such advice")
def test_the_kernel_is_asked() -> None:
    tensor = on_huge_pages(torch.empty(8 * HUGE_PAGE, dtype=torch.uint8))
    assert advised(tensor.data_ptr() + 4 * HUGE_PAGE)


def test_long_caches_stand_on_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        asked.append(tensor.shape[2])
        return tensor

    monkeypatch.setattr("longctx.cache.storage.on_huge_pages", record)
    rows = torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16)
    for capacity in (1, 4 * HUGE_PAGE // 256 - 1, 4 * HUGE_PAGE // 256):  # of 256 bytes a key and head
        Storage.like(rows, capacity)
    assert asked == [4 * HUGE_PAGE // 256]
