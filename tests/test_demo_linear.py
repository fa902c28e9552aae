"""`longctx demo --linear`: its text, its timings, its checks (each must be able to fail), one short run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from longctx.cli import main
from longctx.demo import linear
from longctx.demo.linear_checks import all_checks
from longctx.demo.linear_measure import (
    DENSE,
    LINEAR,
    SDPA,
    Position,
    Result,
    Timing,
    Training,
    attention_rates,
    bits_per_character,
    decode,
    encode,
    entropy,
)
from longctx.demo.linear_report import lines
from longctx.demo.text import read_text


def test_characters_there_and_back():
    text = "".join(map(chr, range(32, 127))) + "\n"
    assert decode(encode(text)) == text
    assert encode(text).unique().numel() == 96
    assert decode(encode("a\u00e9\tb")) == "a??b"
    assert encode("\t").tolist() == [0]


def test_entropy_and_bits_by_hand():
    ids = torch.tensor([0, 1, 2, 2])
    assert entropy(ids) == pytest.approx(1.5)
    assert bits_per_character(torch.zeros(1, 4, 8), ids[None]) == pytest.approx(3.0)


def test_the_text_is_long_enough_for_the_plan():
    assert len(read_text(None)[1]) >= linear.Plan().positions[-1] + linear.Plan().num_tokens


@pytest.mark.parametrize(("budget", "num_dense"), [(0.0, 1), (1e9, 2)])
def test_dense_attention_stops_at_its_budget(budget, num_dense):
    seen: list[str] = []
    timings = attention_rates([128, 256], torch.float32, budget, seen.append)
    lengths = {name: [t.length for t in timings if t.name == name] for name in (LINEAR, DENSE, SDPA)}
    dense = [128, 256][:num_dense]
    assert lengths[DENSE] == lengths[SDPA] == dense
    assert lengths[LINEAR] == [128, 256]
    assert all(timing.seconds > 0 for timing in timings)
    assert len(seen) == len(timings)


def result() -> Result:
    """One that passes every check."""
    positions = [Position(1000 * 4**i, float(i), 1e-3, 1 << 17, 10**8 + i, 3.0) for i in range(3)]
    timings = [Timing(LINEAR, n, n * 1e-7) for n in (1024, 4096)] + [Timing(n, 1024, 1.0) for n in (DENSE, SDPA)]
    training = Training([0, 5], [6.6, 3.0], 1.0, 100, "one\ntwo")
    return Result("text", 20_000, 4.5, "float32", training, 1e-6, positions, timings)


def failed(changed: Result) -> list[int]:
    return [index for index, check in enumerate(all_checks(changed)) if not check.passed]


def test_all_checks_pass_on_a_result_that_is_right():
    assert failed(result()) == []


@pytest.mark.parametrize(
    ("index", "changes"),
    [
        (0, {"training": Training([0, 5], [6.6, 4.6])}),
        (0, {"training": Training([0, 5], [2.0, 3.0])}),
        (1, {"one_by_one_error": 1e-3}),
        (2, {"timings": [*result().timings, Timing(LINEAR, 8192, 1.0)]}),
        (3, {"timings": [*result().timings[:3], Timing(SDPA, 1024, 1e-9)]}),
        (4, {"positions": [*result().positions[:2], dataclasses.replace(result().positions[2], token_seconds=3e-3)]}),
        (5, {"positions": [*result().positions[:2], dataclasses.replace(result().positions[2], state_bytes=1 << 18)]}),
        (6, {"positions": [*result().positions[:2], dataclasses.replace(result().positions[2], peak_bytes=2 * 10**8)]}),
    ],
)
def test_what_is_wrong_is_noticed(index: int, changes: dict[str, Any]):
    assert failed(dataclasses.replace(result(), **changes)) == [index]


def test_the_tables_show_where_dense_attention_ended():
    printed = "\n".join(lines(result()))
    assert re.search(r"attention \(dense\) +1 +-$", printed, re.MULTILINE)
    assert "    one\n    two" in printed


@pytest.mark.parametrize("option", [["--needle", "a 1 2"], ["--length", "4096"], ["--heads", "2"]])
def test_options_of_the_other_demo_are_refused(option, capsys):
    assert main(["demo", "--linear", *option]) == 2
    assert f"--linear does not take {option[0]}" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "text").write_text("few characters")
    assert main(["demo", "--linear", "--quick", "--text", str(tmp_path / "text"), "--out", str(tmp_path)]) == 2
    assert "has 14 characters; 8256 are needed" in capsys.readouterr().err


def test_demo_runs_and_tells(tmp_path: Path, capsys, monkeypatch):
    plan = linear.Plan(num_steps=30, lengths=(512, 1024), budget=0.5, positions=(512, 4096), num_tokens=32)
    monkeypatch.setattr(linear, "QUICK", plan)
    out = tmp_path / "results.json"
    code = main(["demo", "--linear", "--quick", "--dtype", "float32", "--json", str(out), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert (code == 0) == all(check["passed"] for check in results["checks"]), printed
    # The times of a busy machine are not ours to promise.
    timed = ("keeps its rate", "is faster than dense", "the same time")
    assert [c["claim"] for c in results["checks"] if not c["passed"] and not any(t in c["claim"] for t in timed)] == []
    assert results["training"]["steps"][-1] == 30
    assert [timing["length"] for timing in results["timings"]].count(1024) == 3
    assert (tmp_path / "linear.txt").read_text() in printed
    assert (tmp_path / "linear.png").stat().st_size > 10_000
