"""Measures `gpu_cases` on a GPU: `longctx bench --device cuda`, and the last stage of bench/gpu.sh.

Every contender is checked before it is timed. One that is missing, refuses or is wrong is reported as such and has no
number. Contenders take turns; inputs rotate through more memory than the L2 cache holds; medians of many turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark.gpu_cases import CASES
from longctx.benchmark.gpu_targets import Target, evaluated
from longctx.benchmark.gpu_work import GpuCase, Inputs, Work

ROTATED_BYTES = 1 << 28  # several times the L2 cache
ROUNDS = 15
SECONDS_PER_CASE = 6.0
LOST_GPU = 3  # exit code
SHORTEST_SAMPLE = 1e-3  # seconds between two clock readings: shorter calls are repeated


@dataclass(frozen=True)
class Ceilings:
    """What this device did in this run: bytes read and written by a copy, FLOP/s of a bf16 product of random data."""

    copy_bytes_per_second: float
    matmul_flops: float


@dataclass(frozen=True)
class Result:
    """One case: seconds of every contender that could be timed, and why the others could not."""

    op: str
    case: str
    length: int
    seconds: dict[str, float]
    errors: dict[str, str]
    flops: float
    bytes: float
    path: str | None = None  # of attention on this device, in the library's words

    @property
    def ours(self) -> float | None:
        return self.seconds.get("longctx")

    def best(self, prefix: str) -> tuple[str, float] | None:
        """The fastest contender whose name starts with `prefix`."""
        found = [(name, seconds) for name, seconds in self.seconds.items() if name.startswith(prefix)]
        return min(found, key=lambda entry: entry[1], default=None)


@dataclass
class Report:
    """What is written down."""

    environment: dict[str, Any]
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)  # of bench/gpu.py: name, outcome, seconds

    def targets(self) -> list[Target]:
        return evaluated(self.results, self.ceilings)

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"targets": [asdict(target) for target in self.targets()]}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Report:
        ceilings = document["ceilings"]
        return cls(
            environment=document["environment"],
            ceilings=None if ceilings is None else Ceilings(**ceilings),
            results=[Result(**result) for result in document["results"]],
            not_measured=list(document["not_measured"]),
            stages=list(document["stages"]),
        )


# ---- timing ----


def sampler(device: str) -> Callable[[Callable[[], object], int], float]:
    """A function (call, times) -> seconds a call: by CUDA events, on the CPU by its clock."""

    def on_cuda(call: Callable[[], object], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times

    def on_cpu(call: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    return on_cuda if device == "cuda" else on_cpu


def copies(inputs: Inputs) -> list[Inputs]:
    """The same inputs often enough that a turn does not find them in the cache."""
    nbytes = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    count = max(1, min(32, math.ceil(ROTATED_BYTES / max(nbytes, 1)))) if nbytes < ROTATED_BYTES else 1
    others = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()} for _ in range(count - 1)]
    return [inputs, *others]


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """`call` as a CUDA graph, so that short kernels are timed and not Python; itself where it cannot be captured."""
    if device != "cuda":
        return call
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


@torch.no_grad()
def measure(case: GpuCase, device: str = "cuda", *, length: int | None = None, rounds: int = ROUNDS) -> Result:
    """Checks every contender of a case and times those that pass."""
    length = length or case.length
    work = case.work(device, length)
    calls, errors = checked(work, device)
    no_path = case.op.startswith(("linear_attention", "gather_attention"))
    path = None if no_path else attention_path(work.inputs)
    sample = sampler(device)
    sets = copies(work.inputs)

    def turns(name: str) -> Callable[[], object]:
        run = work.contenders[name]
        return lambda: [run(inputs) for inputs in sets]

    # A turn goes through all copies of the inputs.
    timed: dict[str, tuple[Callable[[], object], int]] = {}
    for name in calls:
        turn = turns(name)
        seconds = sample(turn, 1) / len(sets)
        if seconds < SHORTEST_SAMPLE:
            turn = captured(turn, device)
            turn()
            seconds = sample(turn, 1) / len(sets)
        timed[name] = turn, max(1, math.ceil(SHORTEST_SAMPLE / max(seconds * len(sets), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    for turn_number in range(rounds):
        names = list(timed)
        shift = turn_number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            call, times = timed[name]
            samples[name].append(sample(call, times) / len(sets))
        if turn_number >= 2 and time.perf_counter() - start > SECONDS_PER_CASE:
            break
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return Result(case.op, case.title, length, medians, errors, work.flops, work.bytes, path)


def checked(work: Work, device: str) -> tuple[list[str], dict[str, str]]:
    """Names of the contenders that run and are right, and what is wrong with the others."""
    names, errors = [], {}
    for name, run in work.contenders.items():
        try:
            output = run(work.inputs)
            if device == "cuda":
                torch.cuda.synchronize()
            if work.check is not None:
                work.check(name, output)
            names.append(name)
        except Exception as error:  # a peer may raise anything, and that is its result
            lines = str(error).strip().splitlines() or [""]
            errors[name] = f"{type(error).__name__}: {lines[0][:200]}"
        finally:
            output = None
    return names, errors


def attention_path(inputs: Inputs) -> str | None:
    """Which kernel attention over these inputs takes; None off CUDA and for ops without one."""
    if "q" not in inputs or inputs["q"].device.type != "cuda":
        return None
    return str(torch.ops.longctx._cuda_attention_path(inputs["q"], inputs["k"], inputs.get("v", inputs["k"])))


def ceilings(device: str = "cuda", size: int = 8192, copy_bytes: int = 1 << 31) -> Ceilings:
    """Measured here and now; what they depend on (clocks, power) is the same for the cases."""
    sample = sampler(device)
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    copy_once = functools.partial(torch.empty_like(source).copy_, source)
    copy = statistics.median(sample(copy_once, 3) for _ in range(9))
    del source, copy_once
    factors = [torch.randn(size, size, device=device).bfloat16() for _ in range(2)]
    product = statistics.median(sample(functools.partial(torch.matmul, *factors), 5) for _ in range(9))
    return Ceilings(2 * copy_bytes / copy, 2 * size**3 / product)


def measure_all(
    cases: Iterable[GpuCase],
    report: Report,
    *,
    device: str = "cuda",
    length: int | None = None,
    rounds: int = ROUNDS,
    deadline: float = math.inf,
    announce: bool = False,
    say: Callable[[str], object] = print,
    save: Callable[[Report], object] = lambda _: None,
) -> None:
    """Measures until `deadline` (of `time.monotonic`) and saves after each case; says what it did not get to.

    Ends the process, with `LOST_GPU`, after a case that left the GPU unusable for it.
    """
    for case in cases:
        name = case.name(length)
        if time.monotonic() > deadline:
            report.not_measured.append(f"{name}: no time was left")
            say(report.not_measured[-1])
            continue
        if announce:
            say(f"case {name}")
        try:
            report.results.append(measure(case, device, length=length, rounds=rounds))
            say("\n".join(lines_of(report.results[-1], report.ceilings)))
        except Exception as error:  # the next case may still work
            lines = str(error).strip().splitlines() or [""]
            report.not_measured.append(f"{name}: {type(error).__name__}: {lines[0][:200]}")
            say(report.not_measured[-1])
        save(report)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                raise SystemExit(LOST_GPU) from None


# ---- the report ----


def environment() -> dict[str, Any]:
    """What a reader needs to compare: no dates, no paths."""
    facts: dict[str, Any] = {"longctx": longctx.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "build": json.loads(torch.ops.longctx.cuda_build_info()),
        }
        facts["build"].pop("shared_bytes", None)
    return facts


HEAD = (
    "| op | case | length | contender | ms | beside ours | TFLOP/s | of matmul | GB/s | of copy |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def lines_of(result: Result, ceilings: Ceilings | None) -> list[str]:
    """The table rows of one case. "beside ours" is the contender's time over ours: above 1, ours is faster."""
    rows = []
    for name, seconds in result.seconds.items():
        own = name.startswith("longctx") and "dense" not in name
        beside = "" if result.ours is None or name == "longctx" else f"{seconds / result.ours:.2f}x"
        work = ["", "", "", ""]
        if own and result.flops > 0:
            work[0] = f"{result.flops / seconds / 1e12:.1f}"
            work[1] = "" if ceilings is None else f"{result.flops / seconds / ceilings.matmul_flops:.0%}"
        if own and result.bytes > 0:
            work[2] = f"{result.bytes / seconds / 1e9:.0f}"
            work[3] = "" if ceilings is None else f"{result.bytes / seconds / ceilings.copy_bytes_per_second:.0%}"
        cells = [result.op, result.case, str(result.length), name, f"{seconds * 1e3:.3f}", beside, *work]
        rows.append("| " + " | ".join(cells) + " |")
    for name, error in result.errors.items():
        text = error.replace("|", "/")
        rows.append(f"| {result.op} | {result.case} | {result.length} | {name} | not timed: {text} | | | | | |")
    return rows


def markdown(report: Report) -> str:
    """docs/results/gpu.md."""
    facts = {**report.environment, **report.environment.get("build", {})}
    lines = [
        "<!-- written by `bench/gpu.sh` -->",
        ", ".join(f"{key} {value}" for key, value in facts.items() if key != "build"),
        "",
    ]
    if report.stages:
        lines += ["| stage | outcome | seconds |", "|---|---|---|"]
        lines += [f"| {stage['name']} | {stage['outcome']} | {stage['seconds']:.0f} |" for stage in report.stages]
        lines.append("")
    if report.ceilings is not None:
        lines += [
            f"Ceilings of this run: a copy moves {report.ceilings.copy_bytes_per_second / 1e9:.0f} GB/s (read + "
            f"written), an 8192^3 bf16 product of random data runs at {report.ceilings.matmul_flops / 1e12:.0f} "
            "TFLOP/s.",
            "",
        ]
    lines += ["| work | beside | measured | minimum | goal |", "|---|---|---|---|---|"]
    lines += [target.line() for target in report.targets()]
    lines += ["", *HEAD]
    for result in report.results:
        lines += lines_of(result, report.ceilings)
    if paths := {result.path for result in report.results if result.path}:
        lines += ["", "Paths taken: " + "; ".join(sorted(paths)) + "."]
    if report.not_measured:
        lines += ["", "Not measured:", "", *(f"- {name}" for name in report.not_measured)]
    return "\n".join(lines) + "\n"


def write(report: Report, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "gpu.json").write_text(json.dumps(report.document(), indent=1) + "\n")
    (directory / "gpu.md").write_text(markdown(report))


def main(args: argparse.Namespace) -> list[Result]:
    """`longctx bench --device cuda`: measures the selected cases and prints each as it is done."""
    if not torch.cuda.is_available():
        raise ValueError("bench --device cuda needs a GPU and a torch with CUDA")
    start = time.monotonic()
    cases = selected(CASES, args.op, args.dtype)
    report = Report(environment())
    if args.after is not None:
        report, cases = continued(report, cases, args.after, args.out)
    print(json.dumps(report.environment), flush=True)
    report.ceilings = report.ceilings or ceilings()
    print("\n".join(HEAD), flush=True)
    measure_all(
        cases,
        report,
        announce=args.announce,
        length=args.length,
        deadline=math.inf if args.seconds is None else start + args.seconds,
        say=functools.partial(print, flush=True),
        save=lambda report: None if args.out is None else write(report, args.out),
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report.document(), indent=1) + "\n")
    return report.results


def continued(report: Report, cases: list[GpuCase], after: str, out: Path | None) -> tuple[Report, list[GpuCase]]:
    """What a run that ended in the case `after` has written, and the cases behind it."""
    if out is not None and (out / "gpu.json").is_file():
        report = Report.of_document(json.loads((out / "gpu.json").read_text()))
    names = [case.name() for case in cases]
    if after not in names:
        raise ValueError(f"`--after` must name a case; got {after}")
    case = cases[names.index(after)]
    measured = any((r.op, r.case, r.length) == (case.op, case.title, case.length) for r in report.results)
    if not measured and not any(text.startswith(f"{after}: ") for text in report.not_measured):
        report.not_measured.append(f"{after}: it hung, or ended the process")
    return report, cases[names.index(after) + 1 :]


def selected(cases: Sequence[GpuCase], op: str | None = None, dtype: str | None = None) -> list[GpuCase]:
    return [case for case in cases if op in (None, case.op) and dtype in (None, case.dtype)]
