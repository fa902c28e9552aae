"""What the tests ran, as a table: `pytest --write-support-matrix` writes docs/support_matrix.md.

A run knows one device. It rewrites and checks the rows of that device and leaves the others alone.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import target

PATH = Path(__file__).parents[1] / "docs" / "support_matrix.md"

HEAD = """\
# Support matrix

What the tests compare with the float64 twins. `python -m pytest --write-support-matrix` writes the rows of the device
it ran on, and a full test run fails where they claim what that run did not compare. `cuda (host SIMT)` is the CUDA
kernels run on CPU fibers (`--simt`), `cuda` a GPU (`--device cuda`); a device without rows was not run. The CPU kernels
take any head_dim, the CUDA kernels 1 to 256: listed are those compared.

| op | device | dtype | direction | instruction sets | head_dim |
|---|---|---|---|---|---|
"""


class Entry(NamedTuple):
    """One thing that a test compared with its twin."""

    op: str
    device: str
    dtype: str
    direction: str  # "forward" | "backward" | "backward raises"
    isa: str  # "-" where none matters
    head_dim: int  # 0 for an op without one


_ran: set[Entry] = set()


def record(entry: Entry) -> None:
    _ran.add(entry)


def ran() -> frozenset[Entry]:
    return frozenset(_ran)


def committed() -> frozenset[Entry]:
    return parse(PATH.read_text())


def write() -> None:
    """Replaces the rows of this run's device."""
    others = {entry for entry in committed() if entry.device != target.label()}
    PATH.write_text(render(ran() | others))


def render(entries: frozenset[Entry]) -> str:
    head_dims: dict[Entry, set[int]] = defaultdict(set)  # keyed by the entry without its head_dim
    for entry in entries:
        head_dims[entry._replace(head_dim=0)].add(entry.head_dim)
    isas: dict[tuple[Entry, tuple[int, ...]], set[str]] = defaultdict(set)
    for entry, dims in head_dims.items():
        isas[entry._replace(isa=""), tuple(sorted(dims))].add(entry.isa)
    rows = []
    for (entry, dims), names in isas.items():
        listed = ", ".join(str(dim) for dim in dims) if dims != (0,) else "-"
        rows.append((*entry[:4], ", ".join(sorted(names)), listed))
    return HEAD + "".join("| " + " | ".join(row) + " |\n" for row in sorted(rows))


def parse(table: str) -> frozenset[Entry]:
    entries = set()
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] in ("op", "---"):
            continue
        for isa in cells[4].split(", "):
            for dim in cells[5].replace("-", "0").split(", "):
                entries.add(Entry(*cells[:4], isa, int(dim)))
    return frozenset(entries)
