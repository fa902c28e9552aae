"""`longctx demo --decode`: its text, its checks (each must be able to fail), one short run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers")

from longctx.cli import main
from longctx.demo.decode_checks import all_checks
from longctx.demo.decode_measure import Decoded, DecodeTask, Question
from longctx.demo.decode_report import lines
from longctx.demo.decode_rows import ROWS, CacheRow
from longctx.demo.task import ModelSpec
from longctx.demo.text import Haystack, Needle

NEEDLES = [Needle("kemo", ("1", "2")), Needle("rafi", ("3", "4"))]


def test_context_holds_every_needle_at_its_depth() -> None:
    haystack = Haystack("x", tuple(f"w{i}" for i in range(200)))
    words = haystack.context(NEEDLES, length=101, depths=(0.0, 0.5))
    assert len(words) == 101
    assert words[1:6] == NEEDLES[0].words
    assert words[51:56] == NEEDLES[1].words
    assert [word for word in words if word.startswith("w")] == list(haystack.words[:90])


@pytest.mark.parametrize("depths", [(0.5, 0.2), (0.5, 1.1), (-0.1, 0.5)])
def test_context_with_impossible_depths(depths: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="needles at depths"):
        Haystack("x", ("w",) * 200).context(NEEDLES, length=100, depths=depths)


TASK = DecodeTask(
    ModelSpec(dtype="float32"),
    tuple(range(5000)),
    (Question((1, 2, 3), (4,), 0.1, 4500), Question((1, 2, 3), (5,), 0.9, 500)),
    "x",
    "0",
)
CHECKED = [
    CacheRow("exact", "dense", finds_all=True),
    CacheRow("window", "streaming", reach=1000),
]


def results(**changes: object) -> list[Decoded]:
    """Two rows that pass every check, but for `changes` to the second."""
    exact = Decoded("exact", [True, True], 1.0, 0.0, 50.0, 5000.0)
    window = Decoded("window", [False, True], 0.5, 0.0, 1000.0, 5000.0)
    return [exact, dataclasses.replace(window, **changes)]  # type: ignore[arg-type]


def failed(measured: list[Decoded], task: DecodeTask = TASK) -> list[str]:
    return [check.claim for check in all_checks(task, CHECKED, measured) if not check.passed]


def test_checks_hold_and_can_fail() -> None:
    assert not failed(results())
    (claim,) = failed([dataclasses.replace(results()[0], right=[True, False]), results()[1]])
    assert "every needle" in claim
    for right in ([True, True], [False, False]):
        (claim,) = failed(results(right=right))
        assert "none outside" in claim
    (claim,) = failed(results(keys_read=5000.0))
    assert "fewer keys" in claim
    both_outside = dataclasses.replace(TASK, questions=(TASK.questions[0],) * 2)
    (claim,) = failed(results(right=[False, False]), both_outside)
    assert "none outside" in claim


def test_table_names_every_row() -> None:
    measured = [Decoded(row.name, [True, False], 1e-3, 0.1, 10.0, 100.0, 0.5) for row in ROWS]
    text = "\n".join(lines(TASK, measured, 1.0))
    assert all(row.name in text for row in ROWS)
    assert "1/2" in text
    assert "50.0%" in text


def test_one_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["demo", "--decode", "--length", "4096", "--out", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert code == 0, capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in document["rows"]] == [row.name for row in ROWS]
    assert all(check["passed"] for check in document["checks"])
    assert (tmp_path / "decode.txt").read_text() in capsys.readouterr().out
    assert (tmp_path / "decode.png").stat().st_size > 10_000


def test_options_of_other_demos_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--decode", "--needle", "a b"]) == 2
    assert main(["demo", "--decode", "--linear"]) == 2
    assert "--needle" in capsys.readouterr().err
