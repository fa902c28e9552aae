"""Runs cases and writes them down: `longctx bench` for users, `bench/run.py` for the committed tables."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import longctx
from longctx.benchmark.case import Case
from longctx.benchmark.cases import CASES
from longctx.benchmark.gpu_cases import CASES as GPU_CASES
from longctx.benchmark.timing import keep_freed_memory, matmul_ceiling, time_interleaved


@dataclass(frozen=True)
class Row:
    """One case beside one peer."""

    op: str
    case: str
    length: int
    dtype: str
    peer: str
    seconds: float
    peer_seconds: float
    speedup: float
    gflops: float
    ceiling_share: float
    gbytes: float
    minimum: float | None
    goal: float | None


def measure(case: Case, rounds: int, ceilings: dict[torch.dtype, float]) -> list[Row]:
    """Checks a case, then times its contenders in turns."""
    case.check()
    contenders = case.contenders()
    timings = time_interleaved(contenders.run, rounds)
    ours = timings.pop("longctx")
    if case.dtype not in ceilings:
        ceilings[case.dtype] = matmul_ceiling(case.dtype)
    rows = []
    for peer, timing in timings.items():
        minimum, goal = case.goals.get(peer, (None, None))
        rows.append(
            Row(
                op=case.op,
                case=case.name,
                length=case.length,
                dtype=str(case.dtype).removeprefix("torch."),
                peer=peer,
                seconds=ours.median,
                peer_seconds=timing.median,
                speedup=ours.speedup_over(timing),
                gflops=contenders.flops / ours.median / 1e9,
                ceiling_share=contenders.flops / ours.median / ceilings[case.dtype],
                gbytes=contenders.bytes / ours.median / 1e9,
                minimum=minimum,
                goal=goal,
            )
        )
    return rows


def environment() -> dict[str, Any]:
    """The facts a reader needs to compare: no dates, no paths."""
    info = longctx.info()
    return {
        "cpu": info["host"].get("cpu_model", platform.processor()),
        "isa": info["build"]["isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "longctx": longctx.__version__,
        "compiler": info["build"]["compiler"],
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table of the docs."""
    lines = [
        "| op | case | dtype | length | peer | ours ms | peer ms | speed-up | minimum / goal | GFLOP/s |"
        " of matmul ceiling | GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = "" if row.minimum is None else f"{row.minimum:g}x / {row.goal:g}x"
        lines.append(
            f"| {row.op} | {row.case} | {row.dtype} | {row.length} | {row.peer} | {row.seconds * 1e3:.2f} | "
            f"{row.peer_seconds * 1e3:.2f} | {row.speedup:.2f}x | {target} | {row.gflops:.0f} | "
            f"{row.ceiling_share:.0%} | {row.gbytes:.1f} |"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `longctx bench` and `bench/run.py` share."""
    ops = sorted({case.op for case in CASES} | {case.op for case in GPU_CASES})
    parser.add_argument("--op", choices=ops, help="only this op")
    parser.add_argument("--length", type=int, help="sequence length instead of each case's own")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=7, help="turns per contender (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows as JSON")


def selected(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for."""
    cases = [
        case
        for case in CASES
        if args.op in (None, case.op) and args.dtype in (None, str(case.dtype).removeprefix("torch."))
    ]
    # Goals belong to the length they were set for.
    return [replace(case, length=args.length, goals={}) for case in cases] if args.length else cases


def main(args: argparse.Namespace) -> list[Row]:
    """Measures the selected cases, printing each as it is done."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    ceilings: dict[torch.dtype, float] = {}
    rows: list[Row] = []
    print(json.dumps(environment()))
    for case in selected(args):
        new = measure(case, args.rounds, ceilings)
        rows += new
        print(
            "\n".join(
                markdown(rows).splitlines()[-len(new) :] if len(rows) > len(new) else markdown(rows).splitlines()
            ),
            flush=True,
        )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": environment(), "rows": [vars(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return rows
