"""What a page store has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreStats:
    """What a store has done since it was opened or `reset_stats` was called.

    Attributes:
        device_hits, host_hits: pages that attention asked for and found in that tier.
        misses: pages that attention waited for while they were read from the disk.
        read_ahead: pages that began to be read before they were asked for.
        read_ahead_hits: of these, those that were there when they were asked for: host hits that were misses without.
        read_ahead_unused: of these, those that left again without having been asked for.
        evictions: pages that left the host's frames for others.
        bytes_read, bytes_written: of the disk, since the store was opened.
        device_bytes, host_bytes: frames in use; never above `max_device_bytes`, `max_host_bytes`.
    """

    device_hits: int
    host_hits: int
    misses: int
    read_ahead: int
    read_ahead_hits: int
    read_ahead_unused: int
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
