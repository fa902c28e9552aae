"""The order of events of `longctx demo`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import longctx
from longctx.demo import report
from longctx.demo.checks import Check, all_checks
from longctx.demo.measure import Measurement, measure
from longctx.demo.process import Workers
from longctx.demo.rows import DENSE, FLEX, METHODS, SDPA, WINDOW_ROW, Row, controls
from longctx.demo.task import SWEEP_DEPTHS, Task, needle_task, prompt_task
from longctx.demo.text import Needle

EIGHT_B = {  # the linear layers of a Llama of 8 billion parameters
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 if every check holds."""
    start = time.perf_counter()
    task = make_task(args)
    print(*report.header(task, task.main.length), sep="\n")
    rows = run_rows(task)
    checks = all_checks(task, {row.name: row for row in rows})
    if args.show_answers:
        print(*report.answers(task, rows), "", sep="\n")
    title = f"{model_line(task)}, {torch.get_num_threads()} threads"
    report.print_all(title, report.columns(task), report.lines(task, rows), checks, notes(task))
    refusals = [f"{row.name} refused: {row.refused}" for row in rows if row.refused]
    print(*refusals, *save(task, rows, checks, args), sep="\n")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0 if all(check.passed for check in checks) else 1


def make_task(args: argparse.Namespace) -> Task:
    bf16 = fast_bfloat16()
    dtype = args.dtype or ("bfloat16" if bf16 else "float32")
    if args.model is not None:
        if args.prompt is None:
            raise ValueError("longctx demo: --model needs --prompt FILE")
        return prompt_task(args.model, args.prompt, dtype=dtype)
    heads = args.heads or (8 if dtype == "bfloat16" else 4)
    length = args.length or (8192 if args.quick else 32768)
    sweep_length = min(4096 if args.quick else 8192, length)
    timing = () if args.quick else tuple(n for n in (2048, 4096, 16384) if n < length)
    return needle_task(
        {"dtype": dtype, "num_heads": heads, "num_kv_heads": args.kv_heads or max(1, heads // 4)},
        length=length,
        sweep_length=sweep_length,
        timing_lengths=timing,
        depths=SWEEP_DEPTHS[::2] if args.quick else SWEEP_DEPTHS,
        depth=args.depth,
        needle=Needle.parse(args.needle) if args.needle else None,
        text=args.text,
        seed=args.seed,
    )


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AVX512-BF16, or AMX, which implies it."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def run_rows(task: Task) -> list[Measurement]:
    """Every row in its own process; the dense one first, as the others are compared with it."""
    workers = Workers()
    ordinary: tuple[Row, ...] = (SDPA, DENSE, *METHODS, WINDOW_ROW)
    measured: dict[str, Measurement] = {}
    total = (len(ordinary) + 2) * (len(task.trials) + 1)
    with tempfile.TemporaryDirectory() as directory, report.progress_bar(total) as progress:

        def run_row(row: Row) -> None:
            arguments = (row, task.model, task.trials, task.check_length, Path(directory) / "dense.pt")
            measured[row.name] = workers.run(measure, *arguments, progress=progress)

        for row in (DENSE, *(row for row in ordinary if row is not DENSE)):
            run_row(row)
        for row in controls({answer.trial.length: answer.density for answer in measured[FLEX.name].answers}):
            run_row(row)  # after the row whose density they take
    order = [row.name for row in ordinary]
    return sorted(measured.values(), key=lambda row: order.index(row.name) if row.name in order else len(order))


def model_line(task: Task) -> str:
    spec = task.model
    if spec.path is not None:
        return f"{spec.path}, {spec.dtype}"
    return (
        f"constructed Llama, 2 layers, {spec.num_heads} query and {spec.num_kv_heads} kv heads, "
        f"vocabulary {spec.vocab_size}, {spec.dtype}"
    )


def notes(task: Task) -> list[str]:
    if task.model.path is not None:
        return []
    from longctx.models.constructed import retrieval_config

    length = task.main.length
    config = retrieval_config(task.model.vocab_size, task.model.num_heads, task.model.num_kv_heads)
    here = report.attention_share(config, length)
    llama = report.attention_share(argparse.Namespace(**EIGHT_B), length)
    return [
        report.PROVES,
        f"Attention is {here:.0%} of the FLOPs of this dense prefill, and {llama:.0%} of those of an 8B Llama's "
        f"at {length} tokens.",
    ]


def save(task: Task, rows: list[Measurement], checks: list[Check], args: argparse.Namespace) -> list[str]:
    """Writes the figure and the JSON; returns what to tell."""
    told = []
    try:
        from longctx.demo.figures import draw

        told.append(f"figure: {draw(task, rows, args.out)}")
    except ImportError:
        told.append("no figure: matplotlib is missing (pip install 'longctx[demo]')")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(task, rows, checks), indent=1, default=str) + "\n")
        told.append(f"results: {args.json}")
    return told


def as_json(task: Task, rows: list[Measurement], checks: list[Check]) -> dict[str, Any]:
    trials = [
        {name: value for name, value in dataclasses.asdict(trial).items() if name != "prompt"}
        | {"length": trial.length}
        for trial in task.trials
    ]
    measurements = [dataclasses.asdict(row) for row in rows]
    for measurement, row in zip(measurements, rows, strict=True):
        for entry, answer in zip(measurement["answers"], row.answers, strict=True):
            entry["trial"] = task.trials.index(answer.trial)
            entry["right"] = answer.right if answer.trial.expected is not None else None
    return {
        "info": longctx.info(),
        "model": dataclasses.asdict(task.model),
        "text": {"source": task.source, "sha256": task.sha256},
        "trials": trials,
        "rows": measurements,
        "checks": [dataclasses.asdict(check) for check in checks],
    }
