"""Memory on huge pages: rows that are read anywhere in it cost fewer page walks."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
# Linux. Memory that malloc gives out again keeps the pages it has: these are dropped first.
ADVICE = [getattr(mmap, name) for name in ("MADV_DONTNEED", "MADV_HUGEPAGE") if hasattr(mmap, "MADV_HUGEPAGE")]


def on_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, whose contents may go, with the kernel asked for huge pages behind it.

    On pages of 4 KiB a key that is read alone needs a page walk of its own, which takes as long as its row. The
    kernel's default (`madvise`) waits for this advice; where there are no huge pages it changes nothing.
    """
    if not ADVICE or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    for advice in ADVICE if begin < end else []:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
    return tensor
