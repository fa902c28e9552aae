"""The stages of bench/gpu.sh. Each has a share of the time; what is not used goes to the measurements, which come last.

Only the standard library is imported here: this file has to say what is missing on a machine where much is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "longctx"
BUILD = ROOT / "build" / "gpu"
LIBRARIES = ("liblongctx.so", "liblongctx_cuda.so")
LANES = BUILD / "tests" / "cuda" / "longctx_lanes"
# Compared with the float64 twins, and so in docs/support_matrix.md; then the rest that needs nothing but torch.
OP_TESTS = ("attention", "attention_mass", "bad_input", "block_scores", "block_sparse_attention", "conventions",
            "cuda", "merge_states", "opcheck", "select_blocks", "support_matrix", "target")  # fmt: skip
POLICY_TESTS = ("blocktopk", "controls", "flexprefill", "lminfinite", "policy", "xattention")
GPU_FACTS = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
  "gpu": torch.cuda.get_device_name() if cuda else None,
  "capability": list(torch.cuda.get_device_capability()) if cuda else None}))
"""


@dataclass(frozen=True)
class Machine:
    """What is here."""

    torch: str | None
    gpu: str | None
    capability: tuple[int, int] | None
    cutlass: Path | None

    @classmethod
    def look(cls, cutlass: Path | None) -> Machine:
        run = subprocess.run([sys.executable, "-c", GPU_FACTS], capture_output=True, text=True, check=False)
        facts = json.loads(run.stdout) if run.returncode == 0 else {}
        finder = [sys.executable, str(ROOT / "build_tools" / "find_cutlass.py")]
        found = subprocess.run(finder, capture_output=True, text=True, check=False).stdout.strip()
        capability = facts.get("capability")
        return cls(
            torch=facts.get("torch") and f"{facts['torch']} (CUDA {facts['cuda']})",
            gpu=facts.get("gpu"),
            capability=None if capability is None else (capability[0], capability[1]),
            cutlass=cutlass or (Path(found) if found else None),
        )

    @property
    def architecture(self) -> str:
        """What nvcc compiles the code for that every GPU runs; Hopper's own kernels choose theirs."""
        assert self.capability is not None
        return "{}{}-real".format(*self.capability)


@dataclass(frozen=True)
class Stage:
    """A part of the run. `needs` names what is missing here; `run` returns an outcome, "passed" if all is well."""

    name: str
    seconds: float
    what: str
    needs: Callable[[Machine], list[str]]
    run: Callable[[Runner, float], str]


class Runner:
    """Runs commands within time, their output to a log beside the results."""

    def __init__(self, machine: Machine, out: Path, deadline: float) -> None:
        self.machine, self.out, self.deadline = machine, out, deadline
        path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def command(self, log: str, seconds: float, *command: str | Path) -> str:
        """The outcome of one command; its output is appended to `<out>/<log>.log` and its end printed on failure."""
        path = self.out / f"{log}.log"
        try:
            with path.open("a") as file:
                run = subprocess.run(
                    [str(part) for part in command], cwd=ROOT, env=self.environment, stdout=file,
                    stderr=subprocess.STDOUT, timeout=max(seconds, 1.0), check=False,
                )  # fmt: skip
            outcome = "passed" if run.returncode == 0 else f"failed (exit code {run.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"ran out of its {seconds:.0f} s"
        if outcome != "passed":
            print("\n".join(path.read_text(errors="replace").splitlines()[-40:]))
        return outcome


def found(*tools: str) -> Callable[[Machine], list[str]]:
    return lambda machine: [tool for tool in tools if shutil.which(tool) is None]


def python_modules(*names: str) -> list[str]:
    return [f"python module {name}" for name in names if importlib.util.find_spec(name) is None]


def worst(*outcomes: str) -> str:
    return next((outcome for outcome in outcomes if outcome != "passed"), "passed")


# ---- the stages ----


def is_built() -> bool:
    """Whether the libraries are there and newer than every source."""
    built = [PACKAGE / name for name in LIBRARIES] + [LANES]
    if not all(path.is_file() for path in built):
        return False
    sources = [ROOT / "CMakeLists.txt", *(p for d in ("csrc", "include") for p in (ROOT / d).rglob("*") if p.is_file())]
    return min(path.stat().st_mtime for path in built) >= max(path.stat().st_mtime for path in sources)


def build(runner: Runner, seconds: float) -> str:
    if is_built():
        return "passed"
    start = time.monotonic()
    cutlass = runner.machine.cutlass
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "LONGCTX_CUDA": "ON",
        "LONGCTX_TESTS": "ON",  # the lane vectors
        "LONGCTX_GTEST": "OFF",
        "CMAKE_CUDA_ARCHITECTURES": runner.machine.architecture,
        "Python_EXECUTABLE": sys.executable,
        **({} if cutlass is None else {"LONGCTX_CUTLASS_DIR": str(cutlass)}),
    }
    configured = runner.command(
        "build", seconds, "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())
    )
    if configured != "passed":
        return configured
    left = seconds - (time.monotonic() - start)
    targets = ("longctx", "longctx_cuda", "longctx_lanes")
    outcome = runner.command("build", left, "cmake", "--build", BUILD, "-j", str(os.cpu_count()), "--target", *targets)
    if outcome == "passed":
        for name in LIBRARIES:
            shutil.copy2(BUILD / name, PACKAGE / name)
    return outcome


def tests(runner: Runner, seconds: float) -> str:
    """The ops in one process, which writes their rows of the support matrix; then the policies."""
    start = time.monotonic()
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda")
    ops = runner.command(
        "tests", seconds, *pytest, "--write-support-matrix", *(f"tests/test_{name}.py" for name in OP_TESTS)
    )
    workers = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    left = seconds - (time.monotonic() - start)
    policies = runner.command("tests", left, *pytest, *workers, *(f"tests/test_{name}.py" for name in POLICY_TESTS))
    return worst(ops, policies)


def lanes(runner: Runner, seconds: float) -> str:
    return runner.command("lanes", seconds, LANES, "--replay", ROOT / "tests" / "lanes" / "vectors")


def sanitizers(runner: Runner, seconds: float) -> str:
    outcomes = []
    for tool in ("memcheck", "racecheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable)
        outcomes.append(runner.command(tool, seconds / 2, *command, ROOT / "bench" / "gpu_calls.py"))
    return worst(*outcomes)


def profiles(runner: Runner, seconds: float) -> str:
    command = ("ncu", "--clock-control", "none", "--kernel-name-base", "demangled", "-k", "regex:longctx")
    return runner.command("profiles", seconds, *command, sys.executable, ROOT / "bench" / "gpu_calls.py", "--profile")


def measurements(runner: Runner, seconds: float) -> str:
    """Ends before `seconds` by itself; whatever it has measured is on disk after each case."""
    longctx = (sys.executable, "-m", "longctx", "bench", "--device", "cuda")
    margin = min(30.0, seconds / 3)  # one case may still be under way when time is up
    return runner.command("measurements", seconds, *longctx, "--seconds", str(seconds - margin), "--out", runner.out)


def no_needs(machine: Machine) -> list[str]:
    return []


STAGES = (
    Stage("build", 240, "cmake + ninja for this GPU alone, where sources are newer", found("nvcc", "cmake", "ninja"),
          build),
    Stage("tests", 150, "the test suite on the GPU", lambda m: python_modules("pytest", "pytest_timeout"), tests),
    Stage("lanes", 20, "every device wrapper against its recorded lane vectors", no_needs, lanes),
    Stage("sanitizers", 60, "memcheck and racecheck on small shapes", found("compute-sanitizer"), sanitizers),
    Stage("profiles", 30, "ncu on one shape a kernel", found("ncu"), profiles),
    Stage("measurements", 180, "cases beside their peers; takes what the others leave", no_needs, measurements),
)  # fmt: skip


def shares(stages: list[Stage], left: float) -> list[float]:
    """Seconds for each stage: its own, scaled down where that is more than what is left."""
    wanted = sum(stage.seconds for stage in stages)
    return [stage.seconds * min(1.0, left / wanted) for stage in stages]


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
        if stage.name == "build" and not is_built():
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
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where gpu.json and gpu.md go")
    args = parser.parse_args()
    chosen = args.stages.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    stages = [stage for stage in STAGES if stage.name in chosen]
    deadline = time.monotonic() + args.seconds
    machine = Machine.look(args.cutlass)
    if args.dry_run:
        dry_run(machine, stages, args.seconds)
        return 0
    if missing := missing_for_all(machine):
        print(f"bench/gpu.sh: missing: {', '.join(missing)}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    done = run_stages(stages, Runner(machine, args.out.resolve(), deadline))
    finish(args.out, done)
    return 0 if all(stage["outcome"] == "passed" for stage in done) else 1


if __name__ == "__main__":
    sys.exit(main())
