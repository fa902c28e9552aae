"""The options of a test run. Here, not in tests/: pytest looks for them before it knows where the tests are."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the ops run")
    parser.addoption("--simt", metavar="LIBRARY", help="run the CUDA kernels on CPU fibers: the library of tests/simt")
    parser.addoption(
        "--simt-mode",
        metavar="SCHEDULE,LANDING,SEED[,DEVICE]",
        help="in which order fibers run and copies land, on a device of sm_80 or sm_90",
    )
    parser.addoption(
        "--write-support-matrix", action="store_true", help="write docs/support_matrix.md after a full run"
    )
