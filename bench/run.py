"""Every committed number: `python bench/run.py` rewrites docs/results/ (JSON, tables, figure).

Correctness is checked before each timing. Contenders take turns in one process; the tables give medians
and, as speed-up, the median ratio within a turn. Quiet machine or not, only ratios carry over.
Freed memory stays with the process: nobody is timed on pages that the kernel has to clear first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from longctx.benchmark import run
from system import memory_at_128k, selection_share, thread_scaling

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def system_table(entries: list[dict[str, object]]) -> str:
    lines = ["| what | measured | minimum / goal |", "|---|---|---|"]
    lines += [f"| {e['what']} | {e['measured']} | {e['target']} |" for e in entries]
    return "\n".join(lines)


def figure(rows: list[run.Row], path: Path) -> None:
    """Speed-up over each peer, with the minimum and the goal marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.minimum is not None]
    labels = [f"{row.op}\n{row.case}, {row.dtype}, {row.length}\nbeside {row.peer}" for row in rows]
    places = range(len(rows))
    plot, axes = pyplot.subplots(figsize=(9, 0.8 * len(rows) + 1.2))
    axes.barh(places, [row.speedup for row in rows], color="#4477aa", label="measured")
    axes.plot([row.minimum for row in rows], places, "|", color="#cc3311", ms=22, mew=2, label="minimum")
    axes.plot([row.goal for row in rows], places, "|", color="#228833", ms=22, mew=2, label="goal")
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xlabel("peer's time / our time, one thread (log scale)")
    axes.legend(loc="lower right")
    plot.tight_layout()
    plot.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    run.add_arguments(parser)
    parser.add_argument("--skip-system", action="store_true", help="leave out memory, threads and selection")
    args = parser.parse_args()
    rows = run.main(args)
    if args.op or args.dtype or args.length:
        return 0  # a selection is for looking at, not for the committed tables
    torch.set_num_threads(args.threads)
    system = [] if args.skip_system else [selection_share(), memory_at_128k(), thread_scaling()]
    print(system_table(system))
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {"environment": run.environment(), "rows": [vars(row) for row in rows], "system": system}
    (RESULTS / "cpu.json").write_text(json.dumps(document, indent=1) + "\n")
    environment = ", ".join(f"{key} {value}" for key, value in run.environment().items())
    (RESULTS / "cpu.md").write_text(
        f"<!-- written by `python bench/run.py` -->\n{environment}\n\n{run.markdown(rows)}\n\n{system_table(system)}\n"
    )
    figure(rows, RESULTS / "cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
