"""The stages of bench/gpu.sh. Each has a share of the time; what is not used goes to the measurements, which come last.

Only the standard library is imported here: this file has to say what is missing on a machine where much is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_run import LOG, ROOT, Machine, Runner, add_tools_to_path

PACKAGE = ROOT / "python" / "longctx"
BUILD = ROOT / "build" / "gpu"
LIBRARIES = ("liblongctx.so", "liblongctx_cuda.so")
LANES = BUILD / "tests" / "cuda" / "longctx_lanes"
RESULTS = ROOT / "docs" / "results"
SUPPORT_MATRIX = ROOT / "docs" / "support_matrix.md"
# Compared with the float64 twins, and so in docs/support_matrix.md; then the rest that needs nothing but torch.
OP_TESTS = ("append_kv", "attention", "attention_mass", "bad_input", "block_scores", "block_sparse_attention",
            "conventions", "cuda", "gather_attention", "gather_attention_positions", "gather_attention_results",
            "gather_attention_workspace", "kmeans", "kv_rows", "linear_attention", "linear_attention_backward",
            "linear_attention_decode", "merge_states", "opcheck", "page_scores", "select_blocks", "summarize_pages",
            "support_matrix", "target", "threshold_select", "token_scores", "topk_select")  # fmt: skip
POLICY_TESTS = ("blocktopk", "controls", "flexprefill", "lminfinite", "policy", "xattention")


@dataclass(frozen=True)
class Stage:
    """A part of the run. `needs` names what is missing here; `run` returns an outcome, "passed" if all is well."""

    name: str
    seconds: float
    what: str
    needs: Callable[[Machine], list[str]]
    run: Callable[[Runner, float], str]


def found(*tools: str) -> Callable[[Machine], list[str]]:
    return lambda machine: [tool for tool in tools if shutil.which(tool) is None]


def python_modules(*names: str) -> list[str]:
    return [f"python module {name}" for name in names if importlib.util.find_spec(name) is None]


def worst(*outcomes: str) -> str:
    return next((outcome for outcome in outcomes if outcome != "passed"), "passed")


# ---- the stages ----


def is_built() -> bool:
    """Whether the libraries are there and newer than every source."""
    built = [PACKAGE / name for name in LIBRARIES]
    if not all(path.is_file() for path in built):
        return False
    sources = [ROOT / "CMakeLists.txt", *(p for d in ("csrc", "include") for p in (ROOT / d).rglob("*") if p.is_file())]
    return min(path.stat().st_mtime for path in built) >= max(path.stat().st_mtime for path in sources)


def build(runner: Runner, seconds: float) -> str:
    if is_built() and LANES.is_file():
        return "passed"
    start = time.monotonic()
    cutlass = runner.machine.cutlass
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "LONGCTX_CUDA": "ON",
        "LONGCTX_TESTS": "ON",  # the lane vectors
        "LONGCTX_GTEST": "OFF",
        "CMAKE_DISABLE_FIND_PACKAGE_pybind11": "ON",  # no op needs longctx._host
        "CMAKE_CUDA_ARCHITECTURES": runner.machine.architecture,
        "Python_EXECUTABLE": sys.executable,
        **({} if cutlass is None else {"LONGCTX_CUTLASS_DIR": str(cutlass)}),
    }
    configured = runner.command(
        seconds, "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())
    )
    if configured != "passed":
        return configured
    left = seconds - (time.monotonic() - start)
    targets = ("longctx", "longctx_cuda", "longctx_lanes")
    # What builds is used, whatever else does not.
    command = ("cmake", "--build", BUILD, "-j", str(cpu_count()), "--target", *targets, "--", "-k", "0")
    outcome = runner.command(left, *command)
    for name in LIBRARIES if all((BUILD / name).is_file() for name in LIBRARIES) else ():
        shutil.copy(BUILD / name, PACKAGE / name)
    return outcome


def smoke(runner: Runner, seconds: float) -> str:
    return runner.cases(seconds, 30.0, lambda left: (sys.executable, ROOT / "bench" / "gpu_smoke.py"))


def tests(runner: Runner, seconds: float) -> str:
    """With pytest-xdist in several processes: one that loses the GPU, or hangs, costs the others nothing."""
    files = [f"tests/test_{name}.py" for name in (*OP_TESTS, *POLICY_TESTS)]
    before = SUPPORT_MATRIX.read_bytes()
    workers = ("-n", "8", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    outcome = runner.command(
        seconds, sys.executable, "-m", "pytest", "-q", "--tb", "short", "--maxfail", "200", "-p", "no:cacheprovider",
        "--timeout", "60", "--timeout-method", "thread", *workers, "--device", "cuda", "--write-support-matrix", *files,
        OMP_NUM_THREADS="2",
    )  # fmt: skip
    if SUPPORT_MATRIX.read_bytes() != before and runner.out != RESULTS:
        shutil.copy(SUPPORT_MATRIX, runner.out)
    return outcome


def lanes(runner: Runner, seconds: float) -> str:
    return runner.cases(seconds, 10.0, lambda left: (LANES, "--replay", ROOT / "tests" / "lanes" / "vectors"))


def sanitizers(runner: Runner, seconds: float) -> str:
    outcomes = []
    for tool in ("memcheck", "racecheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable)
        outcomes.append(runner.command(seconds / 2, *command, ROOT / "bench" / "gpu_calls.py"))
    return worst(*outcomes)


def profiles(runner: Runner, seconds: float) -> str:
    command = ("ncu", "--clock-control", "none", "--kernel-name-base", "demangled", "-k", "regex:longctx")
    return runner.command(seconds, *command, sys.executable, ROOT / "bench" / "gpu_calls.py", "--profile")


def measurements(runner: Runner, seconds: float) -> str:
    """Ends before `seconds` by itself; whatever it has measured is on disk after each case."""

    def command(left: float) -> tuple[str | Path, ...]:
        time_for_cases = left - min(30.0, left / 3)  # one case may still be under way when time is up
        longctx = (sys.executable, "-m", "longctx", "bench", "--device", "cuda", "--announce")
        return *longctx, "--seconds", f"{time_for_cases:.0f}", "--out", runner.out

    return runner.cases(seconds, 75.0, command)


def no_needs(machine: Machine) -> list[str]:
    return []


def needs_lanes(machine: Machine) -> list[str]:
    return [] if LANES.is_file() else [f"{LANES.relative_to(ROOT)} (stage build)"]


STAGES = (
    Stage("build", 240, "cmake + ninja for this GPU alone, where sources are newer", found("nvcc", "cmake", "ninja"),
          build),
    Stage("smoke", 40, "errors of every op, path, dtype and head_dim", no_needs, smoke),
    Stage("lanes", 15, "every device wrapper against its recorded lane vectors", needs_lanes, lanes),
    Stage("tests", 75, "the test suite on the GPU", lambda m: python_modules("pytest", "pytest_timeout"), tests),
    Stage("sanitizers", 40, "memcheck and racecheck on small shapes", found("compute-sanitizer"), sanitizers),
    Stage("profiles", 20, "ncu on one shape a kernel", found("ncu"), profiles),
    Stage("measurements", 110, "cases beside their peers; takes what the others leave", no_needs, measurements),
)  # fmt: skip


def shares(stages: list[Stage], left: float) -> list[float]:
    """Seconds for each stage, in proportion to its own."""
    wanted = sum(stage.seconds for stage in stages)
    return [stage.seconds * left / wanted for stage in stages]


def run_stages(stages: list[Stage], runner: Runner) -> list[dict[str, object]]:
    """Name, outcome and seconds of every stage. The last one gets all the time that is left."""
    done: list[dict[str, object]] = []
    for number, stage in enumerate(stages):
        left = runner.deadline - time.monotonic()
        share = left if number == len(stages) - 1 else shares(stages[number:], left)[0]
        start = time.monotonic()
        if missing := stage.needs(runner.machine):
            outcome = f"not run: no {', '.join(missing)}"
        elif share < 5.0:
            outcome = "not run: no time was left"
        else:
            print(f"{stage.name}: {stage.what} (at most {share:.0f} s)", flush=True)
            outcome = stage.run(runner, share)
        done.append({"name": stage.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)})
        print(f"{stage.name}: {outcome}", flush=True)
        if stage.name == "build" and not all((PACKAGE / name).is_file() for name in LIBRARIES):
            print("nothing more can run without the libraries", file=sys.stderr)
            break
    return done


def finish(out: Path, stages: list[dict[str, object]]) -> None:
    """Adds to the report what only this script knows: the stages, the commit, the driver."""
    if not (out / "gpu.json").is_file():
        return
    sys.path.insert(0, str(ROOT / "python"))
    from longctx.benchmark import gpu

    report = gpu.Report.of_document(json.loads((out / "gpu.json").read_text()))
    report.stages = stages
    for name, command in {
        "commit": ("git", "rev-parse", "--short", "HEAD"),
        "driver": ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }.items():
        if shutil.which(command[0]):
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                report.environment[name] = run.stdout.split("\n")[0].strip()
    gpu.write(report, out)
    print((out / "gpu.md").read_text())


def missing_for_all(machine: Machine) -> list[str]:
    missing = [] if machine.torch else ["torch"]
    return missing if machine.gpu else [*missing, "a GPU that torch sees"]


def dry_run(machine: Machine, stages: list[Stage], seconds: float) -> None:
    print(f"torch {machine.torch or 'missing'}; GPU {machine.gpu or 'missing'}; CUTLASS {machine.cutlass or 'missing'}")
    if missing := missing_for_all(machine):
        print(f"missing: {', '.join(missing)}: no stage would run")
    if machine.cutlass is None:
        print("missing: CUTLASS headers: the sm_90a path would be left out (--cutlass INCLUDE_FOLDER)")
    for stage, share in zip(stages, shares(stages, seconds), strict=True):
        lacks = stage.needs(machine)
        print(f"{stage.name:<13}{share:4.0f} s  {stage.what}" + (f"; missing: {', '.join(lacks)}" if lacks else ""))
    for peer in ("flash_attn", "flash_attn_interface", "flashinfer", "fla", "triton", "transformers"):
        if importlib.util.find_spec(peer) is None:
            print(f"missing: {peer}: what needs it is not measured")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--dry-run", action="store_true", help="print the stages and what is missing; run nothing")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything (default %(default)g)")
    parser.add_argument("--stages", default=",".join(names), help="some of %(default)s")
    parser.add_argument("--cutlass", type=Path, help="CUTLASS's include folder (default: from the Python environment)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where gpu.json, gpu.md and gpu.log go")
    args = parser.parse_args()
    chosen = args.stages.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    stages = [stage for stage in STAGES if stage.name in chosen]
    deadline = time.monotonic() + args.seconds
    add_tools_to_path()
    machine = Machine.look(args.cutlass)
    if args.dry_run:
        dry_run(machine, stages, args.seconds)
        return 0
    if missing := missing_for_all(machine):
        print(f"bench/gpu.sh: missing: {', '.join(missing)}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / LOG).unlink(missing_ok=True)
    done = run_stages(stages, Runner(machine, args.out.resolve(), deadline))
    finish(args.out, done)
    return 0 if all(stage["outcome"] == "passed" for stage in done) else 1


if __name__ == "__main__":
    sys.exit(main())
