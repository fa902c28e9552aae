"""Options, fixtures and the support matrix; `python -m pytest` from the repository root runs everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import support_matrix
from longctx.testing import ISAS, available_isas, force_isa


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-support-matrix", action="store_true", help="write docs/support_matrix.md after a full run"
    )


def pytest_report_header() -> str:
    info = json.loads(torch.ops.longctx.build_info())
    return f"longctx: isa {info['isa']} of {info['detected_isa']}, engines {info['engines']}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` tests run only under `-m slow`; the support matrix is checked last."""
    if "slow" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
    items.sort(key=lambda item: item.path.name == "test_support_matrix.py")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set in turn, forced."""
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


def is_full_run(session: pytest.Session) -> bool:
    """Whether every test file takes part and no test was picked out."""
    config = session.config
    picked = config.getoption("keyword") or config.getoption("markexpr") or config.getoption("lf", False)
    files = {item.path for item in session.items}
    return not picked and files >= set(Path(__file__).parent.glob("test_*.py"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--write-support-matrix"):
        return
    if exitstatus != 0 or not is_full_run(session):
        raise pytest.UsageError("docs/support_matrix.md is written only by a full run that passes")
    support_matrix.PATH.write_text(support_matrix.render(support_matrix.ran()))
