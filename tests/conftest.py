"""Which tests run, fixtures and the support matrix; `python -m pytest` from the repository root runs everything.

`--device cuda` runs it on a GPU; `--simt LIBRARY` runs the tests of the ops on the CUDA kernels without one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import longctx
import support_matrix
import target
from longctx.testing import available_isas, force_isa

# Fibers are some thousand times slower than a GPU: of these files alone, and of some these tests alone.
SIMT_TESTS: dict[str, frozenset[str]] = {
    "test_append_kv.py": frozenset(),
    "test_attention.py": frozenset(),
    "test_attention_mass.py": frozenset(),
    "test_bad_input.py": frozenset(),
    "test_block_scores.py": frozenset(),
    "test_block_sparse_attention.py": frozenset(),
    "test_cache_launches.py": frozenset(),
    "test_conventions.py": frozenset(),
    "test_cuda.py": frozenset(),
    "test_gather_attention.py": frozenset(),
    "test_gather_attention_positions.py": frozenset(),
    "test_gather_attention_results.py": frozenset(),
    "test_gather_attention_workspace.py": frozenset(),
    "test_kmeans.py": frozenset(),
    "test_kv_rows.py": frozenset(),
    "test_linear_attention.py": frozenset(),
    "test_linear_attention_decode.py": frozenset(),
    "test_linear_attention_reverse.py": frozenset(),
    "test_merge_states.py": frozenset(),
    "test_page_scores.py": frozenset(),
    "test_policy.py": frozenset({"test_equals_masked_dense"}),
    "test_select_blocks.py": frozenset(),
    "test_summarize_pages.py": frozenset(),
    "test_support_matrix.py": frozenset(),
    "test_target.py": frozenset(),
    "test_threshold_select.py": frozenset(),
    "test_token_scores.py": frozenset(),
    "test_topk_select.py": frozenset(),
}
# Of the cases of these tests, or of all tests of these files, one in so many on fibers: they differ little.
SIMT_ONE_IN = {
    "test_every_block_equals_dense": 5,
    "test_garbage_values_do_no_harm": 5,
    "test_gather_attention.py": 9,
    "test_gather_attention.py::test_head_dims": 2,
    "test_gather_attention.py::test_head_dim_v": 2,
    "test_gather_attention_positions.py": 12,
    "test_gather_attention_results.py": 13,
    "test_linear_attention.py": 2,
    "test_linear_attention_reverse.py": 4,
    "test_more_iterations_are_no_worse": 2,
    "test_page_scores.py": 3,
    "test_random_combinations": 2,
    "test_seeds_are_better_than_random_keys": 2,
    "test_summarize_pages.py": 3,
    "test_threshold_select.py": 8,
    "test_token_scores.py": 3,
    "test_topk_select.py": 8,
}
MAX_CUDA_HEAD_DIM = 256
# The files whose tests fill the support matrix.
RECORDING = frozenset(
    Path(__file__).parent / f"test_{name}.py"
    for name in (
        "append_kv",
        "attention",
        "attention_mass",
        "block_scores",
        "block_sparse_attention",
        "cuda",
        "gather_attention",
        "gather_attention_positions",
        "gather_attention_results",
        "gather_attention_workspace",
        "kmeans",
        "kv_rows",
        "linear_attention",
        "linear_attention_backward",
        "linear_attention_decode",
        "merge_states",
        "opcheck",
        "page_scores",
        "select_blocks",
        "summarize_pages",
        "threshold_select",
        "token_scores",
        "topk_select",
    )
)

FILES = pytest.StashKey[frozenset[Path]]()  # of the tests collected, before any is left out
LOST = pytest.StashKey[str]()  # why the GPU serves this process no longer
LEFT_OUT = pytest.StashKey[Counter[str]]()  # reason -> tests


def pytest_configure(config: pytest.Config) -> None:
    target.choose(config.getoption("--device"), config.getoption("--simt"), config.getoption("--simt-mode"))


def pytest_report_header() -> str:
    return f"longctx: {target.describe()}"


def why_left_out(item: pytest.Item, seen: Counter[str]) -> str:
    """Why a test says nothing about the target; empty if it does. `seen` counts the cases of each test so far."""
    runs_on = item.get_closest_marker("runs_on")
    if runs_on is not None and target.name not in runs_on.args:
        return str(runs_on.kwargs["reason"])
    if target.name == "cpu":
        return ""
    if target.name == "simt":
        file, name = item.path.name, getattr(item, "originalname", "")
        chosen = SIMT_TESTS.get(file)
        if chosen is None or (chosen and name not in chosen):
            return "too slow on fibers; every op is compared elsewhere"
        keys = (f"{file}::{name}", name, file)
        seen[keys[0]] += 1
        if (seen[keys[0]] - 1) % next((SIMT_ONE_IN[key] for key in keys if key in SIMT_ONE_IN), 1):
            return "too slow on fibers; other cases of the same test run"
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    missing = tuple(set(longctx.ops.__all__) - target.ops)
    file = item.path.stem.removeprefix("test_")
    if file.startswith(missing) or getattr(params.get("case"), "name", None) in missing:
        return "an op without a CUDA kernel"
    if params.get("dtype") == torch.float64 and item.path.name != "test_merge_states.py":
        return "float64: on CUDA an error (test_cuda.py), but in merge_states and the ops that move rows"
    if any(params.get(dim, 0) > MAX_CUDA_HEAD_DIM for dim in ("head_dim", "head_dim_v")):
        return f"head_dim above {MAX_CUDA_HEAD_DIM}: on CUDA an error (test_cuda.py)"
    return ""


def thin_out_sanitized(items: list[pytest.Item]) -> None:
    """Of tests marked `sanitize(one_in=n)` every n-th case stays marked: all engines, not all cases.

    Where n has no factor in common with their numbers, the cases that stay go round all of them.
    """
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sanitize")
        one_in = 1 if mark is None else mark.kwargs.get("one_in", 1)
        test = item.nodeid.partition("[")[0]
        if seen[test] % one_in:
            item.own_markers[:] = [own for own in item.own_markers if own.name != "sanitize"]
        seen[test] += 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", target.isas(), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests about other targets are left out, each with its reason; `slow` ones run only under `-m slow`."""
    config.stash[FILES] = frozenset(item.path for item in items)
    if "slow" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
    thin_out_sanitized(items)
    seen: Counter[str] = Counter()
    reasons = {item: why_left_out(item, seen) for item in items}
    config.stash[LEFT_OUT] = Counter(filter(None, reasons.values()))
    config.hook.pytest_deselected(items=[item for item in items if reasons[item]])
    items[:] = [item for item in items if not reasons[item]]
    items.sort(key=lambda item: item.path.name == "test_support_matrix.py")


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    left_out = config.stash.get(LEFT_OUT, Counter())  # unset where a path was not found
    return [f"left out on {target.label()}: {count}: {why}" for why, count in left_out.most_common()]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the CPU in turn, forced; on other targets one value."""
    if target.name != "cpu":
        yield request.param
        return
    if request.param not in available_isas():
        pytest.skip(f"this machine has no {request.param}")
    with force_isa(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- one process, or several of pytest-xdist ----


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notices a kernel that took the process's CUDA context with it: whatever runs here next would fail too."""
    report = yield
    if report.failed and target.name == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            item.config.stash[LOST] = str(error).partition("\n")[0]
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    why = item.config.stash.get(LOST, "")
    if why and is_worker(item.config):  # another worker takes its place
        os._exit(1)
    if why:
        pytest.exit(f"{item.nodeid} lost the GPU: {why}", returncode=1)


def is_full_run(session: pytest.Session) -> bool:
    """Whether everything that fills the support matrix takes part and no test was picked out."""
    config = session.config
    picked = config.getoption("keyword") or config.getoption("markexpr") or config.getoption("lf", False)
    return not picked and not is_worker(config) and config.stash.get(FILES, frozenset()) >= RECORDING


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker ran counts here, in the process that started it."""
    output = getattr(node, "workeroutput", {})
    for entry in output.get("ran", ()):
        support_matrix.record(support_matrix.Entry(*entry))
    files = frozenset(map(Path, output.get("files", ())))
    node.config.stash[FILES] = node.config.stash.get(FILES, frozenset()) | files


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if is_worker(config):
        output = {"ran": [list(entry) for entry in support_matrix.ran()], "files": [*map(str, config.stash[FILES])]}
        config.workeroutput.update(output)  # type: ignore[attr-defined]
    elif config.getoption("--write-support-matrix"):
        if exitstatus != 0 or not is_full_run(session):
            raise pytest.UsageError("docs/support_matrix.md is written only by a full run that passes")
        support_matrix.write()
