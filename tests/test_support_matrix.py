"""docs/support_matrix.md claims nothing that a full run does not compare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import support_matrix
import target
from conftest import RECORDING, is_full_run
from longctx.testing import ISAS, available_isas
from support_matrix import Entry


def test_table_round_trip() -> None:
    entries = frozenset(
        Entry(op, device, "float32", "forward", isa if device == "cpu" else "-", dim)
        for device in target.LABELS.values()
        for op, dims in (("attention", (1, 64, 300)), ("merge_states", (0,)))
        for isa in ISAS
        for dim in dims
    ) | {Entry("attention", "cpu", "float32", "forward", "amx", 80)}
    assert support_matrix.parse(support_matrix.render(entries)) == entries


def test_recording_files_are_those_that_record() -> None:
    """A run of these alone may write the table."""
    for path in Path(__file__).parent.glob("test_*.py"):
        imports = [line for line in path.read_text().splitlines() if line.startswith("from checks import")]
        records = any(re.search(r"\b(record|check_attention)\b", line) for line in imports)
        assert records == (path in RECORDING), path.name


def test_committed_table_names_known_devices() -> None:
    devices = {entry.device for entry in support_matrix.committed()}
    assert "cpu" in devices, "the committed table is empty"
    assert devices <= set(target.LABELS.values())


def test_committed_table_claims_only_what_ran(request: pytest.FixtureRequest) -> None:
    if not is_full_run(request.session):
        pytest.skip("only a full run can tell")
    if request.config.getoption("--write-support-matrix"):
        pytest.skip("the table is about to be written")
    here = {*available_isas(), "-"}
    claimed = {entry for entry in support_matrix.committed() if entry.device == target.label() and entry.isa in here}
    not_run = claimed - support_matrix.ran()
    assert not not_run, f"claimed but not run: {sorted(not_run)}"
