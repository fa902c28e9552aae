"""The table and the words around it; plain text where rich is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from longctx.demo.checks import Check
from longctx.demo.measure import Answer, Measurement
from longctx.demo.process import Progress
from longctx.demo.rows import DENSE, SDPA
from longctx.demo.task import Task

HAS_RICH = importlib.util.find_spec("rich") is not None

PROVES = """\
What this proves: the plumbing (tokenizer, cache, GQA, generate) runs on longctx kernels; they are exact; and whether a
policy's selection still recalls one fact in a long text. What it does not: how well a trained model keeps its quality.
These weights are constructed, retrieval is nearly one-hot, and their attention is of the kind that column and diagonal
methods expect."""

WIDTH = 140


def header(task: Task, length: int) -> list[str]:
    return [
        f"text    {task.source}",
        f"sha256  {task.sha256}",
        f"length  {length} tokens, and {task.sweep_length} for the sweep over depths",
    ]


def columns(task: Task) -> list[str]:
    answers = "needles" if task.main.expected is not None else "as dense"
    main, sweep = _short(task.main.length), _short(task.sweep_length)
    return [
        "policy",
        answers,
        f"prefill\n{main} [s]",
        "vs\nSDPA",
        "vs best\ndense",
        "selec-\ntion",
        f"density\n{main}",
        f"density\n{sweep}",
        f"coverage\n{sweep}",
        "lowest\nrow",
        f"rel. error\n{sweep}",
        "peak\n[MB]",
    ]


def lines(task: Task, rows: Iterable[Measurement]) -> list[list[str]]:
    """The cells of the table."""
    rows = list(rows)
    by_name = {row.name: row for row in rows}
    dense = main_answer(by_name[DENSE.name])
    sdpa_seconds = main_answer(by_name[SDPA.name]).prefill_seconds
    best_seconds = min(sdpa_seconds, dense.prefill_seconds)
    table = []
    for row in rows:
        if row.refused:
            table.append([row.name, "refused", *["-"] * (len(columns(task)) - 2)])
            continue
        main = main_answer(row)
        if task.main.expected is None:
            same = sum(a == b for a, b in zip(main.tokens, dense.tokens, strict=False))
            score = f"{same}/{len(dense.tokens)}"
        else:
            score = "{}/{}".format(*needles(row))
        sweep_density = _mean(answer.density for answer in row.answers if answer.trial.length == task.sweep_length)
        table.append(
            [
                row.name,
                score,
                f"{main.prefill_seconds:.2f}",
                f"{sdpa_seconds / main.prefill_seconds:.2f}x",
                f"{best_seconds / main.prefill_seconds:.2f}x",
                f"{main.select_seconds / main.prefill_seconds:.1%}" if main.select_seconds else "-",
                f"{main.density:.1%}",
                f"{sweep_density:.1%}",
                _percent(row.coverage_mean),
                _percent(row.coverage_min),
                "-" if row.relative_error is None else f"{row.relative_error:.1e}",
                f"{row.peak_bytes / 1e6:.0f}",
            ]
        )
    return table


def needles(row: Measurement) -> tuple[int, int]:
    """Needles right, of how many."""
    scored = [answer for answer in row.answers if answer.trial.scored]
    return sum(answer.right for answer in scored), len(scored)


def main_answer(row: Measurement) -> Answer:
    return next(answer for answer in row.answers if answer.trial.kind == "main")


def answers(task: Task, rows: Iterable[Measurement]) -> Iterator[str]:
    """What every row said to every prompt."""
    for row in rows:
        for answer in row.answers:
            trial = answer.trial
            verdict = "" if trial.expected is None else ("right" if answer.right else "WRONG")
            said = task.words(answer.tokens) or "(nothing)"
            yield f"{row.name}: {trial.kind}, {trial.length} tokens, depth {trial.depth}: {said}  {verdict}"


def attention_share(config: Any, length: int) -> float:
    """Share of the prefill FLOPs that dense causal attention takes, embeddings and logits apart."""
    inner, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = config.hidden_size * (2 * inner + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    attention = inner * length  # two products, half of the square each, over 2 FLOPs
    return float(attention / (attention + linear))


def print_all(title: str, header: list[str], rows: list[list[str]], checks: list[Check], notes: list[str]) -> None:
    if not HAS_RICH:
        print(title, *plain_table(header, rows), "", sep="\n")
    else:
        _rich_table(title, header, rows)
    for check in checks:
        detail = f": {check.detail}" if check.detail else ""
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.claim}{detail}")
    print("", *notes, sep="\n")


def plain_table(header: list[str], rows: list[list[str]]) -> list[str]:
    header = [name.replace("-\n", "").replace("\n", " ") for name in header]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    first = [row[0].ljust(widths[0]) for row in [header, *rows]]
    rest = [[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)] for row in [header, *rows]]
    return ["  ".join([name, *cells]) for name, cells in zip(first, rest, strict=True)]


def _rich_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        right, _, total = row[1].partition("/")
        table.add_row(*row, style=None if right == total else "yellow")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """A function to call after every step with what runs; a bar where a terminal and rich are there."""
    if HAS_RICH and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        described = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Bar(*described, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda step: bar.update(task, advance=1, description=step)
    else:
        shown: list[str] = []

        def step(name: str) -> None:
            if name not in shown:
                shown.append(name)
                print(f"  {name} ...", file=sys.stderr, flush=True)

        yield step


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
