"""The order of events of `longctx demo --linear`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

import longctx
from longctx.demo import linear_report as report
from longctx.demo.linear_checks import all_checks
from longctx.demo.linear_measure import Result, attention_rates, encode, entropy, one_by_one_error, stream, train
from longctx.demo.main import fast_bfloat16
from longctx.demo.process import Workers
from longctx.demo.report import progress_bar
from longctx.demo.text import read_text

# Of the demo of sparse prefill alone.
ELSEWHERE = ("length", "needle", "heads", "kv_heads", "model", "prompt", "show_answers")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything."""

    num_steps: int = 400
    lengths: tuple[int, ...] = tuple(4096 << i for i in range(7))
    budget: float = 8.0  # seconds a call of dense attention may take
    positions: tuple[int, ...] = (4096, 16384, 65536, 262144)
    num_tokens: int = 256


QUICK = Plan(num_steps=40, lengths=(1024, 2048, 4096, 8192), budget=0.5, positions=(512, 2048, 8192), num_tokens=64)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 if every check holds."""
    for name in ELSEWHERE:
        if getattr(args, name):
            raise ValueError(f"longctx demo: --linear does not take --{name.replace('_', '-')}")
    start = time.perf_counter()
    plan = QUICK if args.quick else Plan()
    source, text = read_text(args.text)
    dtype = args.dtype or ("bfloat16" if fast_bfloat16() else "float32")
    result = measure(plan, source, encode(text), getattr(torch, dtype), args.seed)
    checks = all_checks(result)
    lines = [*report.lines(result), *(f"{'ok  ' if c.passed else 'FAIL'}  {c.claim}: {c.detail}" for c in checks)]
    args.out.mkdir(parents=True, exist_ok=True)
    lines += ["", *report.NOTES]
    (args.out / "linear.txt").write_text("\n".join(lines) + "\n")
    print(*lines, *save(result, args), f"{time.perf_counter() - start:.0f} s in all", sep="\n")
    return 0 if all(check.passed for check in checks) else 1


def measure(plan: Plan, source: str, ids: torch.Tensor, dtype: torch.dtype, seed: int) -> Result:
    """Everything, each part in a process of its own."""
    needed = plan.positions[-1] + plan.num_tokens
    if len(ids) < needed:
        raise ValueError(f"longctx: {source} has {len(ids)} characters; {needed} are needed")
    workers = Workers()
    total = 12 + len(plan.positions) + 3 * len(plan.lengths)
    with tempfile.TemporaryDirectory() as directory, progress_bar(total) as progress:
        path = Path(directory)
        return Result(
            source=source,
            num_characters=len(ids),
            entropy=entropy(ids),
            dtype=str(dtype).removeprefix("torch."),
            training=workers.run(train, ids, plan.num_steps, seed, path, progress=progress),
            one_by_one_error=workers.run(one_by_one_error, ids[:200], path, progress=progress),
            positions=workers.run(stream, ids, plan.positions, plan.num_tokens, path, progress=progress),
            timings=workers.run(attention_rates, plan.lengths, dtype, plan.budget, progress=progress),
        )


def save(result: Result, args: argparse.Namespace) -> list[str]:
    """Writes the figure and the JSON; returns what to tell."""
    told = [f"table: {args.out / 'linear.txt'}"]
    try:
        from longctx.demo.linear_figure import draw

        told.append(f"figure: {draw(result, args.out)}")
    except ImportError:
        told.append("no figure: matplotlib is missing (pip install 'longctx[demo]')")
    if args.json is not None:
        document = {"info": longctx.info(), **dataclasses.asdict(result)}
        document["checks"] = [dataclasses.asdict(check) for check in all_checks(result)]
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        told.append(f"results: {args.json}")
    return told
