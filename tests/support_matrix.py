"""What the tests ran, as a table: `pytest --write-support-matrix` writes docs/support_matrix.md."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).parents[1] / "docs" / "support_matrix.md"

HEAD = """\
# Support matrix

What the tests compare with the float64 twins. `python -m pytest --write-support-matrix` writes it; a full test run
fails where it claims what that run did not compare. The CPU kernels take any head_dim: listed are those compared.

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
