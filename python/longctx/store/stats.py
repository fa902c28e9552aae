"""What a page store has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreStats:
    """What a store has done since it was opened or `reset_stats` was called.

    Attributes:
        device_hits, host_hits: pages that attention asked for and found in that tier.
        misses: pages that were read from the disk while attention waited.
        read_ahead: pages that were read before they were asked for.
        evictions: pages that left the host's frames for others.
        bytes_read, bytes_written: of the disk, since the store was opened.
        device_bytes, host_bytes: frames in use; never above `max_device_bytes`, `max_host_bytes`.
    """

    device_hits: int
    host_hits: int
    misses: int
    read_ahead: int
    evictions: int
    bytes_read: int
    bytes_written: int
    device_bytes: int
    host_bytes: int

    @property
    def hit_rate(self) -> float:
        """The share of pages that attention found in memory; 1 before it asked for any."""
        asked = self.device_hits + self.host_hits + self.misses
        return 1.0 - self.misses / asked if asked else 1.0
