"""threshold_select: the same indices as the twin on every instruction set, and what its two rules promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_same_bits, record
from longctx import reference
from longctx.reference.threshold_select import logit_masses
from op_case import int32, randn
from test_topk_select import INF, NAN, ROWS
from topk_cases import SCORE_DTYPES

RULES = [
    *(("threshold", value) for value in (-INF, -1.0, -0.0, 0.0, 1e-41, 0.3, 1.7, INF)),
    *(("cumulative", value) for value in (-1.0, 0.0, 0.5, 0.95, 1.0, 2.0)),
]


def assert_same_rows(scores: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    actual = longctx.threshold_select(scores, **options)
    assert_same_bits(actual, reference.threshold_select(scores, **options))
    record("threshold_select", scores.dtype)
    return actual


@pytest.mark.sanitize(one_in=7)
@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_matches_the_twin(isa: str, rows: str, dtype: torch.dtype) -> None:
    for n in (1, 17, 300):
        scores = ROWS[rows](2, n).to(dtype)
        for method, value in RULES:
            for max_k in (1, 20, n + 1):
                assert_same_rows(scores, value=value, method=method, max_k=max_k)


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 20.0, 1000.0])
def test_long_rows(isa: str, spread: float, dtype: torch.dtype) -> None:
    scores = (spread * randn(2, 70_001, seed=1)).to(dtype)
    for max_k in (100, 5000, 70_001):
        for value in (0.0, 2 * spread):
            assert_same_rows(scores, value=value, max_k=max_k)
        for value in (0.3, 0.9, 1.0):
            assert_same_rows(scores, value=value, method="cumulative", max_k=max_k)


@pytest.mark.parametrize("method", ["threshold", "cumulative"])
def test_lengths_and_forced_indices(isa: str, method: str) -> None:
    lengths = int32(0, 1, 6, 40, 299, 300, -7, 2**31 - 1)
    scores = randn(8, 300, seed=2)
    for row, length in enumerate(lengths[:6].tolist()):
        scores[row, length:] = NAN if row % 2 else INF
    for num_first, num_last in ((0, 0), (2, 3), (10, 10), (20, 0)):
        options = {"num_first": num_first, "num_last": num_last, "method": method, "lengths": lengths}
        for value in (-1.0, 0.4, 0.999):
            indices, _ = assert_same_rows(scores, value=value, max_k=20, **options)
            assert all(set(range(min(num_first, 300))) <= set(row) for row in indices[4:6].tolist())


def test_a_threshold_between_16_bit_numbers() -> None:
    """The bound is compared as float32: 1 + 2^-20 is above bfloat16's and float16's 1."""
    for dtype in SCORE_DTYPES:
        scores = torch.tensor([1.0, 1.0 + 2.0**-20, 1.5, -1.0], dtype=dtype)
        above = longctx.threshold_select(scores, value=1.0 + 2.0**-20, max_k=4)[0].tolist()
        assert above == ([1, 2, -1, -1] if dtype == torch.float32 else [2, -1, -1, -1])


def test_at_most_max_k_and_the_best_of_them() -> None:
    scores = randn(3, 4000, seed=3)
    indices, counts = longctx.threshold_select(scores, value=0.0, max_k=64)
    assert torch.equal(indices, longctx.topk_select(scores, 64)[0])
    assert counts.tolist() == [64] * 3
    indices, counts = longctx.threshold_select(scores, value=0.0, max_k=4000)
    assert counts.tolist() == (scores >= 0).sum(-1).tolist()


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_cumulative_holds_the_share_and_no_more(spread: float) -> None:
    logits = spread * randn(4, 20_000, seed=4)
    weights = logits.double().softmax(dim=-1)
    for value in (0.1, 0.5, 0.9, 0.999):
        indices, counts = longctx.threshold_select(logits, value=value, method="cumulative", max_k=20_000)
        for row, kept, count in zip(weights, indices, counts.tolist(), strict=True):
            mass = row[kept[:count].long()]
            assert mass.sum() >= value - 1e-6
            assert mass.sum() - mass.min() < value + 1e-6


@pytest.mark.parametrize("spread", [1e-6, 1.0, 10.0])
def test_masses_are_those_of_the_exponential(spread: float) -> None:
    logits = spread * randn(5000, seed=5)
    exact = (logits.double() - logits.double().max()).exp() * 2.0**40
    error = (logit_masses(logits).double() - exact).abs()
    assert (error <= 1.0 + 4e-6 * exact).all()


def test_forced_mass_counts() -> None:
    logits = torch.tensor([5.0, 0.0, 0.0, 1.0, -3.0])
    options = {"method": "cumulative", "max_k": 5}
    assert longctx.threshold_select(logits, value=0.9, num_first=1, **options)[1] == 1
    assert longctx.threshold_select(logits, value=0.9, num_last=1, **options)[0].tolist() == [0, 4, -1, -1, -1]


def test_rows_that_hold_no_mass() -> None:
    for fill in (NAN, -INF):
        scores = torch.full((1, 50), fill)
        for method in ("threshold", "cumulative"):
            indices, counts = assert_same_rows(scores, value=0.5, method=method, max_k=8, num_last=1)
            assert indices[0].tolist() == [49] + [-1] * 7
            assert counts.tolist() == [1]


@pytest.mark.runs_on("cpu", reason="thread counts: of the CPU kernels")
def test_result_does_not_depend_on_threads(isa: str) -> None:
    scores = 3 * randn(5, 70_001, seed=6)
    before = torch.get_num_threads()
    try:
        for method, value in (("threshold", 2.0), ("cumulative", 0.8)):
            results = []
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                results.append(longctx.threshold_select(scores, value=value, method=method, max_k=3000))
            for result in results[1:]:
                assert_same_bits(result, results[0])
    finally:
        torch.set_num_threads(before)
