"""Timing on a machine that is shared: contenders take turns, and only ratios within a turn are compared."""

from __future__ import annotations

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


def matmul_ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square torch matmul in `dtype`: a ceiling that was measured here and now."""
    best = 0.0
    for size in (256, 512, 1024):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        timing = time_interleaved({"matmul": functools.partial(torch.matmul, a, b)}, rounds=9)["matmul"]
        best = max(best, 2 * size**3 / min(timing.seconds))
    return best
