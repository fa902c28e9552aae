"""`longctx bench --device cuda` and bench/gpu.py as far as a CPU goes: every case is built, checked, timed, written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import RECORDING
from longctx.benchmark import gpu, gpu_cases, gpu_gather, gpu_linear
from longctx.benchmark.gpu_cases import CASES, HEADLINE, GpuCase
from longctx.benchmark.gpu_targets import TENTH, K
from longctx.cli import main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.runs_on("cpu", reason="bench/gpu.sh itself runs it on a GPU")
EVERY_CASE = [pytest.param(case, id=f"{case.op}-{case.title}-{case.length}") for case in CASES]
NEEDS_CUDA = {"longctx sm_80 path", "sdpa cudnn", "sdpa efficient"}


def test_cases_are_distinct() -> None:
    assert len({(case.op, case.title, case.length) for case in CASES}) == len(CASES)


def smallest(cases: list[GpuCase]) -> list[GpuCase]:
    """One case of each kind: the options, not the lengths, make the difference on a CPU."""
    kinds = {(case.op, case.title): case for case in cases if case.small < 2048}
    return [case for case in kinds.values() if case.op != "linear_attention" or is_small(case.title)]


def is_small(title: str) -> bool:
    """Whether a CPU has done with a case of linear attention in a second or two; their shapes differ in size alone."""
    return title.startswith(gpu_linear.LAUNCH_BOUND) or title.endswith("fp32")


@pytest.mark.parametrize("case", smallest(CASES), ids=lambda case: f"{case.op}-{case.title}")
def test_every_contender_that_a_cpu_has_agrees(case: GpuCase) -> None:
    work = case.work("cpu", case.small)
    names, errors = gpu.checked(work, "cpu")
    assert names[0] == "longctx"
    assert set(errors) <= NEEDS_CUDA, errors
    assert work.flops >= 0
    assert work.bytes > 0


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention"], ids=lambda case: case.title)
def test_inputs_at_full_length(case: GpuCase) -> None:
    inputs = case.work("meta").inputs
    assert inputs["k"].shape[2] == case.length
    assert inputs["q"].device.type == "meta"


def test_measured_beside_its_peers() -> None:
    report = gpu.Report({})
    said: list[str] = []
    gpu.measure_all([HEADLINE[0]], report, device="cpu", length=256, rounds=2, say=said.append)
    measured = report.results[0]
    assert measured.seconds["longctx"] > 0
    assert measured.seconds["sdpa flash"] > 0
    assert set(measured.errors) <= NEEDS_CUDA
    assert not report.not_measured
    assert "| sdpa flash |" in said[0]


def test_a_case_that_cannot_be_built_is_reported() -> None:
    report = gpu.Report({})
    broken = GpuCase("no blocks", "block_sparse_attention", 100, lambda length, device: 1 // 0)  # type: ignore[arg-type, return-value]
    gpu.measure_all([broken], report, device="cpu", say=lambda text: None)
    assert report.not_measured == [
        "block_sparse_attention: no blocks, 100: ZeroDivisionError: integer division or modulo by zero"
    ]


def test_prompt_case() -> None:
    case = next(case for case in HEADLINE if case.op == "policy")
    result = gpu.measure(case, "cpu", length=case.small, rounds=1)
    assert {"longctx", "selection", "longctx dense", "sdpa flash"} <= set(result.seconds)


def test_a_wrong_contender_has_no_time() -> None:
    case = HEADLINE[0]
    work = case.work("cpu", 256)
    wrong = work.contenders | {"wrong": lambda i: gpu_cases.ours(i) + 1.0, "broken": lambda i: i["nothing"]}
    names, errors = gpu.checked(gpu.Work(work.inputs, wrong, 1.0, 1.0, work.check), "cpu")
    assert "wrong" not in names
    assert "broken" not in names
    assert "not close" in errors["wrong"]
    assert errors["broken"].startswith("KeyError")


def test_density_of_random_tiles() -> None:
    for columns_per_block in (1, 8):
        for density in (0.1, 0.5, 1.0):
            tiles = gpu_cases.random_tiles(2, 64, columns_per_block, density, "cpu")
            visible = torch.ones(64, 64).tril().bool().repeat_interleave(columns_per_block, 1)
            assert not (tiles & ~visible).any()
            assert bool(tiles[:, torch.arange(64), torch.arange(64) * columns_per_block].all())
            assert float(tiles.sum() / (2 * visible.sum())) == pytest.approx(density, abs=0.03)


def test_copies_rotate_through_more_than_a_cache() -> None:
    inputs = {"q": torch.zeros(1 << 20), "block_size_k": 128}
    sets = gpu.copies(inputs)
    assert len(sets) == 32
    assert len({i["q"].data_ptr() for i in sets}) == 32
    assert len(gpu.copies({"q": torch.zeros(gpu.ROTATED_BYTES // 4)})) == 1


def test_time_budget() -> None:
    report = gpu.Report({})
    said: list[str] = []
    gpu.measure_all(HEADLINE[:2], report, device="cpu", deadline=time.monotonic() - 1.0, say=said.append)
    assert not report.results
    assert [text.rpartition(": ")[2] for text in report.not_measured] == ["no time was left"] * 2
    assert said == report.not_measured


def test_ceilings_are_measured() -> None:
    ceilings = gpu.ceilings("cpu", size=64, copy_bytes=1 << 16)
    assert ceilings.copy_bytes_per_second > 0
    assert ceilings.matmul_flops > 0


# ---- the report ----


def result(case: str, length: int, **seconds: float) -> gpu.Result:
    names = {name.replace("__", " "): value for name, value in seconds.items()}
    return gpu.Result("attention", case, length, names, {"sdpa cudnn": "RuntimeError: no | kernel"}, 4e12, 2e9, "sm90")


SYNTHETIC = gpu.Report(
    {"gpu": "a GPU that is none", "build": {"nvcc": "0.0"}},
    gpu.Ceilings(4e12, 8e14),
    [result("dense causal bf16 D=128, 32 heads", 16 * K, longctx=0.010, sdpa__flash=0.009, sdpa__efficient=0.02)],
    ["attention: a case, 128: no time was left"],
    [{"name": "tests", "outcome": "passed", "seconds": 12.0}],
)


def test_markdown_of_a_synthetic_result() -> None:
    text = gpu.markdown(SYNTHETIC)
    assert (
        "| attention | dense causal bf16 D=128, 32 heads | 16384 | longctx | 10.000 |  | 400.0 | 50% | 200 | 5% |"
        in text
    )
    assert "| sdpa flash | 9.000 | 0.90x |" in text
    assert "not timed: RuntimeError: no / kernel" in text
    assert "| best SDPA backend | 0.9 | 0.85 | 1.1 |" in text
    assert "- attention: a case, 128: no time was left" in text
    assert "| tests | passed | 12 |" in text
    cells = [line.count("|") for line in text.splitlines() if line.startswith("| attention")]
    assert set(cells) == {11}


def test_targets_without_their_cases_say_so() -> None:
    targets = gpu.Report({}).targets()
    assert len(targets) == 17
    assert all(target.measured is None and "| not measured |" in target.line() for target in targets)
    measured = [target for target in SYNTHETIC.targets() if target.measured is not None]
    assert [target.measured for target in measured] == [pytest.approx(0.9)]
    assert measured[0].met


def test_targets_beside_the_copy_of_the_run() -> None:
    """Half of the bytes of a copy in the same time."""
    gathered = gpu.Result("gather_attention", gpu_gather.PAGES, 128 * K, {"longctx": 1e-3}, {}, 0.0, 2e9)
    targets = gpu.Report({}, gpu.Ceilings(4e12, 8e14), [gathered]).targets()
    assert [target.measured for target in targets if target.measured is not None] == [pytest.approx(0.5)]
    assert not any(target.measured for target in gpu.Report({}, None, [gathered]).targets())


def test_targets_from_sparse_results() -> None:
    """10% of the pairs in a tenth of the dense time is an efficiency of 1; half as fast is 0.5, and missed."""
    pairs = 0.1 * 64 * K * (64 * K + 1) / 2
    for seconds, efficiency in ((0.01, 1.0), (0.02, 0.5)):
        names = {"longctx": seconds, "longctx dense": 0.1, "sdpa flash": 0.2, "sdpa cudnn": 0.1, "flex": 0.03}
        sparse = gpu.Result("block_sparse_attention", TENTH, 64 * K, names, {}, pairs * 4 * 32 * 128, 1.0)
        targets = {target.beside: target for target in gpu.Report({}, results=[sparse]).targets() if target.measured}
        assert targets["our own dense kernel"].measured == pytest.approx(efficiency, rel=1e-3)
        assert targets["our own dense kernel"].met == (efficiency == 1.0)
        assert targets["best dense SDPA backend"].measured == pytest.approx(0.1 / seconds)
        assert targets["compiled FlexAttention"].measured == pytest.approx(0.03 / seconds)
        assert ("**0.5**, missed" in gpu.markdown(gpu.Report({}, results=[sparse]))) == (efficiency == 0.5)


def test_targets_of_linear_attention() -> None:
    """The floors are those that the names of the targets tell, and a time of twice the floor is a share of a half."""
    results = []
    for case, floor in ((gpu_linear.LARGE, 0.187e-3), (gpu_linear.LARGE + gpu_linear.BACKWARD, 0.655e-3)):
        found = next(c for c in CASES if (c.op, c.title, c.length) == ("linear_attention", case, 8 * K))
        work = found.work("meta")
        assert work.bytes / 4.3e12 == pytest.approx(floor, rel=2e-3)
        seconds = {"longctx": 2 * floor, "fla": 5 * floor}
        results.append(gpu.Result("linear_attention", case, 8 * K, seconds, {}, work.flops, work.bytes))
    launch_bound = {"longctx": 2e-5, "fla": 14e-5}
    results.append(gpu.Result("linear_attention", gpu_linear.LAUNCH_BOUND, K, launch_bound, {}, 1.0, 1.0))
    measured = [target.measured for target in gpu.Report({}, results=results).targets() if target.measured]
    assert measured == [pytest.approx(x, rel=2e-3) for x in (0.5, 0.5, 2.5, 7.0)]


def test_wrong_linear_attention_has_no_time() -> None:
    """Rows that forget too slowly, and the gradient of the wrong tensor."""
    case = next(case for case in CASES if case.title == gpu_linear.LAUNCH_BOUND + gpu_linear.BACKWARD)
    work = case.work("cpu", 256)
    right = gpu_linear.with_gradients(gpu_linear.torch_chunks)
    contenders: dict[str, gpu_cases.Run] = {
        "right": right,
        "forgets less": lambda i: right(i | {"log_decay": i["log_decay"] / 2}),
        "dk for dv": lambda i: (lambda out, dq, dk, dv: (out, dq, dk, dk))(*right(i)),
    }
    names, errors = gpu.checked(gpu.Work(work.inputs, contenders, 1.0, 1.0, work.check), "cpu")
    assert names == ["right"]
    assert errors["forgets less"].startswith("ValueError: out is not close")
    assert errors["dk for dv"].startswith("ValueError: dv is not close")


def test_written_and_read_again(tmp_path: Path) -> None:
    gpu.write(SYNTHETIC, tmp_path)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert gpu.Report.of_document(document) == SYNTHETIC
    assert (tmp_path / "gpu.md").read_text() == gpu.markdown(SYNTHETIC)
    assert len(document["targets"]) == len(SYNTHETIC.targets())


def test_selected() -> None:
    assert gpu.selected(CASES, "merge_states", None) == [case for case in CASES if case.op == "merge_states"]
    assert [case.dtype for case in gpu.selected(CASES, "attention", "float16")] == ["float16"]
    assert gpu.selected(CASES) == CASES


def test_bench_on_cuda_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert main(["bench", "--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


# ---- bench/gpu.sh ----


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tests_on_a_gpu_may_write_the_support_matrix() -> None:
    assert {ROOT / "tests" / f"test_{name}.py" for name in load_script().OP_TESTS} >= RECORDING


def test_stages_share_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script()
    given: dict[str, float] = {}

    def stage(name: str, seconds: float, outcome: str = "passed", missing: tuple[str, ...] = ()) -> Any:
        def run(runner: Any, share: float) -> str:
            given[name] = share
            return outcome

        return script.Stage(name, seconds, "a stage", lambda machine: list(missing), run)

    stages = [stage("a", 30), stage("b", 30, missing=("ncu",)), stage("c", 60, "failed (exit code 1)"), stage("d", 60)]
    machine = script.Machine(None, None, None, None)
    done = script.run_stages(stages, script.Runner(machine, tmp_path, time.monotonic() + 90))
    assert [entry["outcome"] for entry in done] == ["passed", "not run: no ncu", "failed (exit code 1)", "passed"]
    assert given["a"] == pytest.approx(15, abs=1)  # half of what it wants, as there is half the time
    assert given["c"] == pytest.approx(45, abs=1)  # what is left, shared with the last
    assert given["d"] == pytest.approx(90, abs=1)  # all that is left
    assert "b: not run: no ncu" in capsys.readouterr().out
    late = script.run_stages(stages[:1], script.Runner(machine, tmp_path, time.monotonic() + 1))
    assert [entry["outcome"] for entry in late] == ["not run: no time was left"]


def runner_in(folder: Path) -> Any:
    script = load_script()
    return script.Runner(script.Machine(None, None, None, None), folder, time.monotonic() + 90)


def test_commands_end_in_time_and_leave_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runner = runner_in(tmp_path)
    assert runner.command(20, sys.executable, "-c", "print('all well')") == "passed"
    assert runner.command(20, sys.executable, "-c", "print('bad'); raise SystemExit(3)") == "failed (exit code 3)"
    sleeps = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    start = time.monotonic()
    assert runner.command(1, sys.executable, "-c", sleeps) == "ran out of its 1 s"
    assert time.monotonic() - start < 15
    log = (tmp_path / "gpu.log").read_text()
    assert "print('all well')\nall well\n$ " in log
    assert capfd.readouterr().out == "bad\n\n"


# Cases a to e: b hangs, c ends its process, d is wrong.
CASES_THAT_FAIL = """
import sys, time
names = list("abcde")
for name in names[names.index(sys.argv[2]) + 1 if len(sys.argv) > 2 else 0:]:
    print("case", name, flush=True)
    if name == "b": time.sleep(60)
    if name == "c": sys.exit(3)
    print(name, "is", "wrong" if name == "d" else "right", flush=True)
sys.exit(1)
"""


def test_cases_behind_one_that_hangs_or_dies_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "cases.py"
    script.write_text(CASES_THAT_FAIL)
    outcome = runner_in(tmp_path).cases(60, 3, lambda left: (sys.executable, script))
    assert outcome == "failed; b said nothing for 3 s; c ended it (exit code 3)"
    assert [line for line in capfd.readouterr().out.splitlines() if " is " in line] == [
        "a is right", "d is wrong", "e is right",
    ]  # fmt: skip
    assert "case b\nb said nothing for 3 s\n$ " in (tmp_path / "gpu.log").read_text()


def test_a_program_that_never_starts_is_not_repeated(tmp_path: Path) -> None:
    assert runner_in(tmp_path).cases(60, 3, lambda left: ("sh", "-c", "exit 7")) == "the start ended it (exit code 7)"


def test_smoke_on_the_cpu() -> None:
    """The last cases, and that a result with one wrong element, infinity or index is found."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    after = "linear_attention_decode float16: plain"
    command = [sys.executable, "bench/gpu_smoke.py", "--device", "cpu", "--after", after]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^ok    linear_attention_decode \w+: all_options: error", run.stdout, re.MULTILINE)) == 3
    planted = """
import runpy, torch
compare = runpy.run_path("bench/gpu_smoke.py")["compare"]
exact = torch.randn(1, 2, 64, 64, dtype=torch.float64)
exact[0, 0, 0, 0] = -torch.inf
here = exact.to(torch.bfloat16)
assert compare(here, here, exact)[1]
for place, value in (((0, 1, 9, 5), 3.0), ((0, 0, 0, 0), 0.0), ((0, 1, 9, 5), torch.nan), ((0, 1, 9, 5), torch.inf)):
    wrong = here.clone()
    wrong[place] += value - wrong[place] if value != 3.0 else value
    text, right = compare(wrong, here, exact)
    assert not right and "1/8192 wrong, first at " + str(list(place)) in text, text
text, right = compare(torch.arange(4), torch.tensor([0, 1, 2, 4]), exact)
assert not right and text == "1/4 wrong, first at [3], indices a dim 1/4", text
"""
    subprocess.run([sys.executable, "-c", planted], cwd=ROOT, env=environment, timeout=120, check=True)


def test_smokes_of_selections_on_the_cpu() -> None:
    """Every call of the ops that summarise, score, select, cluster and move, in every dtype."""
    code = """
import runpy
smoke = runpy.run_path("bench/gpu_smoke.py")
ops = ("summarize_pages", "update_pages", "page_scores", "token_scores", "topk_select", "threshold_select",
       "append_kv", "gather_kv", "compact_kv", "truncate_kv", "kmeans")
chosen = [s for s in smoke["other_smokes"]("cpu") if s.op in ops]
assert {s.op for s in chosen} == set(ops) and all([smoke["run"](s, "cpu") for s in chosen])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_linear_smokes_on_the_cpu() -> None:
    """Every call of one dtype and head_dim; the names tell all of them apart."""
    code = """
import runpy
smoke = runpy.run_path("bench/gpu_smoke.py")
smokes = list(smoke["linear_smokes"]("cpu"))
assert len({s.name for s in smokes}) == len(smokes)
chosen = [s for s in smokes if s.name.startswith("bfloat16 80 ")]
assert len(chosen) == 16 and all([smoke["run"](s, "cpu") for s in chosen])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_run_continues_behind_a_case(tmp_path: Path) -> None:
    first, second, *_ = HEADLINE
    gpu.write(gpu.Report({"gpu": "here"}, results=[result(first.title, first.length, longctx=1.0)]), tmp_path)
    report, cases = gpu.continued(gpu.Report({}), HEADLINE, first.name(), tmp_path)
    assert (report.environment, cases, report.not_measured) == ({"gpu": "here"}, HEADLINE[1:], [])
    report, cases = gpu.continued(gpu.Report({}), HEADLINE, second.name(), tmp_path)
    assert cases == HEADLINE[2:]
    assert report.not_measured == [f"{second.name()}: it hung, or ended the process"]
    with pytest.raises(ValueError, match="must name a case"):
        gpu.continued(gpu.Report({}), HEADLINE, "lunch", tmp_path)


def test_cases_are_announced() -> None:
    said: list[str] = []
    gpu.measure_all([HEADLINE[0]], gpu.Report({}), device="cpu", length=256, rounds=1, announce=True, say=said.append)
    assert said[0] == f"case {HEADLINE[0].name(256)}"


def test_finish_adds_stages_and_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.write(SYNTHETIC, tmp_path)
    stages = [{"name": "lanes", "outcome": "not run: no time was left", "seconds": 0.0}]
    load_script().finish(tmp_path, stages)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["stages"] == stages
    assert document["results"] == json.loads(json.dumps(SYNTHETIC.document()["results"]))
    assert "| lanes | not run: no time was left | 0 |" in capsys.readouterr().out


def run_gpu_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/local/cuda/bin:/usr/bin:/bin", "HOME": "/tmp"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_dry_run_prints_stages_and_what_is_missing() -> None:
    run = run_gpu_sh("--dry-run", "--seconds", "300")
    assert run.returncode == 0, run.stderr
    for stage in ("build", "smoke", "lanes", "tests", "sanitizers", "profiles", "measurements"):
        assert re.search(rf"^{stage} +\d+ s", run.stdout, re.MULTILINE), run.stdout
    if not torch.cuda.is_available():
        assert "missing: a GPU" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_fails_and_writes_nothing(tmp_path: Path) -> None:
    run = run_gpu_sh("--out", str(tmp_path))
    assert run.returncode != 0
    assert "a GPU" in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--seconds", "soon"], ["--stages", "tests,lunch"], ["--what"]])
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    run = run_gpu_sh(*arguments)
    assert run.returncode == 2
    assert "usage" in run.stderr
