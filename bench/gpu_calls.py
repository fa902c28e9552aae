"""Calls every op on a GPU: what compute-sanitizer and ncu look at in bench/gpu.sh.

Without options: the calls of tests/cases.py in every dtype, small and odd. `--profile`: one call an op at a size where
the kernel, not its launch, takes the time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def small_calls() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import target

    target.name = "cuda"  # before `cases` asks what a GPU takes
    from cases import CASES

    ops = target.cuda_ops()
    for case in CASES.values():
        for make in case.calls.values() if case.name in ops else ():
            for dtype in case.dtypes:
                case.op(**target.native(make(dtype)))
    torch.cuda.synchronize()


def profiled_calls() -> None:
    from longctx.benchmark.gpu_cases import CASES

    for op in dict.fromkeys(case.op for case in CASES if case.op != "policy"):
        case = next(case for case in CASES if case.op == op)
        work = case.work("cuda", min(case.length, 16384))
        work.contenders["longctx"](work.inputs)
        torch.cuda.synchronize()


if __name__ == "__main__":
    profiled_calls() if "--profile" in sys.argv[1:] else small_calls()
