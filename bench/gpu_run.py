"""What the stages of bench/gpu.py share: the machine, and commands that end in time whatever the GPU does."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
LOG = "gpu.log"
Command = tuple["str | Path", ...]
Process = subprocess.Popen[str]
GPU_FACTS = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
  "gpu": torch.cuda.get_device_name() if cuda else None,
  "capability": list(torch.cuda.get_device_capability()) if cuda else None}))
"""


def add_tools_to_path() -> None:
    """Where nvcc, cmake and ninja are when nobody put them on PATH: beside this Python and in CUDA's own folder."""
    folders = [Path(sys.executable).parent, Path(sys.prefix) / "bin"]
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)])


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
            cutlass=cutlass.resolve() if cutlass else (Path(found) if found else None),
        )

    @property
    def architecture(self) -> str:
        """What nvcc compiles the code for that every GPU runs; Hopper's own kernels choose theirs."""
        assert self.capability is not None
        return "{}{}-real".format(*self.capability)


class Runner:
    """Runs commands within time, their output to one log beside the results."""

    def __init__(self, machine: Machine, out: Path, deadline: float) -> None:
        self.machine, self.out, self.deadline = machine, out, deadline
        path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def command(self, seconds: float, *command: str | Path, **environment: str) -> str:
        """The outcome of one command; the end of its output is printed on failure."""
        with (self.out / LOG).open("a+") as log:
            start = self._begin(log, command)
            process = self._start(command, environment, stdout=log)
            try:
                code = process.wait(max(seconds, 1.0))
                outcome = "passed" if code == 0 else f"failed (exit code {code})"
            except subprocess.TimeoutExpired:
                outcome = f"ran out of its {seconds:.0f} s"
            finally:
                end(process)
            if outcome != "passed":
                log.seek(start)
                print("\n".join(log.read().splitlines()[-40:]), flush=True)
        return outcome

    def cases(self, seconds: float, silence: float, command: Callable[[float], Command]) -> str:
        """The outcome of a program that announces each case as `case NAME` and takes `--after NAME`.

        `command` makes it from the seconds that are left.

        A case that kills it, or in which it says nothing for `silence` seconds, is named, and the program is started
        again behind that case. Exit codes 0 and 1 say that it came to its end.
        """
        stop, lost = time.monotonic() + seconds, []
        after: tuple[str, ...] = ()
        while True:
            name, why, code = self._follow(stop, silence, (*command(stop - time.monotonic()), *after))
            if why is None and code in (0, 1):
                failures = (["failed"] if code else []) + lost
                return "; ".join(failures) or "passed"
            lost.append(f"{name or 'the start'} {why or f'ended it (exit code {code})'}")
            self._say(lost[-1])
            if not name or ("--after", name) == after or time.monotonic() + 5.0 > stop:
                return "; ".join(lost)
            after = ("--after", name)

    def _follow(self, stop: float, silence: float, command: Command) -> tuple[str, str | None, int | None]:
        """The last case announced, why the program was killed (None: it was not), its exit code."""
        with (self.out / LOG).open("a+") as log:
            self._begin(log, command)
            process = self._start(command, {}, stdout=subprocess.PIPE)
            lines: queue.Queue[str | None] = queue.Queue()

            def read() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, daemon=True).start()
            name = ""
            try:
                while True:
                    left = stop - time.monotonic()
                    try:
                        line = lines.get(timeout=max(0.1, min(silence, left)))
                    except queue.Empty:
                        return name, f"said nothing for {silence:.0f} s" if left > silence else "had no time left", None
                    if line is None:
                        return name, None, process.wait(10.0)
                    log.write(line)
                    log.flush()
                    if line.startswith("case "):
                        name = line.removeprefix("case ").strip()
                    else:
                        print(line, end="", flush=True)
            finally:
                end(process)

    def _begin(self, log: IO[str], command: Command) -> int:
        """Writes the command into the log; where its output will begin."""
        log.write(f"$ {' '.join(map(str, command))}\n")
        log.flush()
        return int(log.tell())

    def _say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / LOG).open("a") as log:
            log.write(text + "\n")

    def _start(self, command: Command, environment: dict[str, str], stdout: Any) -> Process:
        return subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=self.environment | environment, stdout=stdout,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip


def end(process: Process) -> None:
    """Ends a command with all that it started; does not wait for one that the driver holds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end", flush=True)
