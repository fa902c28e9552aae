"""Memory on huge pages: what it holds is what was written, and the kernel was asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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
def test_long_caches_ask_for_huge_pages() -> None:
    rows = torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16)
    middle = 3 * HUGE_PAGE
    assert advised(Storage.like(rows, 4 * HUGE_PAGE // 256).data.data_ptr() + middle)
    assert not advised(Storage.like(rows, 4 * HUGE_PAGE // 256 - 1).data.data_ptr() + middle)
