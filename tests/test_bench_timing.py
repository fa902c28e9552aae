"""What timings rest on."""

from __future__ import annotations

import subprocess
import sys

# Pages that three tensors of 256 MiB, one after the other, have to get from the kernel.
PAGES_OF_THREE_TENSORS = """
import resource, torch
from longctx.benchmark import keep_freed_memory
assert keep_freed_memory(1 << 30) is True
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again() -> None:
    command = [sys.executable, "-c", PAGES_OF_THREE_TENSORS]
    pages = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert pages < 1000  # of 196608
