"""Timing on a machine that is shared: contenders take turns, and only ratios within a turn are compared."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speedup_over(self, peer: Timing) -> float:
        """Median over the rounds of peer's time / own time."""
        return statistics.median(b / a for a, b in zip(self.seconds, peer.seconds, strict=True))


def time_interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, Timing]:
    """Runs every contender once a round, in rotating order, after one warm-up of each.

    With one thread the clock is the thread's CPU time, so that other processes do not count; with
    more it is wall time.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for name in names:
            contenders[name]()
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                start = clock()
                contenders[name]()
                seconds[name].append(clock() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def keep_freed_memory(reserved_bytes: int = 3 << 30) -> bool:
    """Lets this process use its freed memory again, as one that serves for long does; tells whether it could.

    glibc hands blocks of 32 MiB and more back to the kernel, which clears their pages when the next output asks for
    them: at long lengths that is a third of the time of a kernel that is bound by memory, and all noise. What
    is set here holds for every contender. The first `reserved_bytes` are cleared now.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; elsewhere the allocator stays as it is
    if mallopt is None:
        return False
    trim_threshold, max_mapped_blocks = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX
    kept = bool(mallopt(max_mapped_blocks, 0) and mallopt(trim_threshold, 2**31 - 1))
    torch.zeros(reserved_bytes, dtype=torch.uint8).fill_(1)  # and freed; zeros alone may not touch its pages
    return kept


def matmul_ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square torch matmul in `dtype`: a ceiling that was measured here and now."""
    best = 0.0
    for size in (256, 512, 1024):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        timing = time_interleaved({"matmul": functools.partial(torch.matmul, a, b)}, rounds=9)["matmul"]
        best = max(best, 2 * size**3 / min(timing.seconds))
    return best
