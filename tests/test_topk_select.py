"""topk_select: what a stable sort gives, index for index, on every kind of row and every instruction set."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_same_bits, record
from longctx import reference
from longctx.testing import surround_with_nan
from op_case import generator, int32, randn
from test_conventions import UNTOUCHED
from topk_cases import SCORE_DTYPES

INF, NAN = float("inf"), float("nan")
SPECIALS = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])
MILLION = 1 << 20


def assert_same_rows(scores: Tensor, k: int, **options: object) -> tuple[Tensor, Tensor]:
    actual = longctx.topk_select(scores, k, **options)
    expected = reference.topk_select(scores, k, **options)
    assert_same_bits(actual, expected)
    record("topk_select", scores.dtype)
    return actual


def stable_sort(scores: Tensor, k: int) -> Tensor:
    """The definition for rows without NaN, by torch alone."""
    order = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values.int()


def pick(values: Tensor, *shape: int, seed: int = 0) -> Tensor:
    return values[torch.randint(0, len(values), shape, generator=generator(seed))]


ROWS = {
    "random": lambda *shape: randn(*shape, seed=1),
    "ascending": lambda *shape: randn(*shape, seed=1).sort(dim=-1).values,
    "descending": lambda *shape: randn(*shape, seed=1).sort(dim=-1, descending=True).values,
    "negative": lambda *shape: -1 - randn(*shape, seed=1).abs(),
    "constant": lambda *shape: torch.full(shape, 0.3),
    "constant negative": lambda *shape: torch.full(shape, -0.3),
    "zeros of both signs": lambda *shape: torch.zeros(shape) * randn(*shape, seed=1).sign(),
    "two values": lambda *shape: randn(*shape, seed=1).sign(),
    "ties": lambda *shape: randn(*shape, seed=1).round(),
    "specials": lambda *shape: pick(SPECIALS, *shape),
    "denormal": lambda *shape: randn(*shape, seed=1) * 1e-40,
    "all NaN": lambda *shape: torch.full(shape, NAN),
    "mostly NaN": lambda *shape: randn(*shape, seed=1).masked_fill(pick(torch.arange(10), *shape) > 0, NAN),
    "mostly -inf": lambda *shape: randn(*shape, seed=1).masked_fill(pick(torch.arange(10), *shape) > 0, -INF),
    "all inf": lambda *shape: torch.full(shape, INF),
}


@pytest.mark.sanitize(one_in=5)
@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_matches_a_stable_sort(isa: str, rows: str, dtype: torch.dtype) -> None:
    for n in (1, 15, 16, 17, 64, 65, 1000, 5000):
        scores = ROWS[rows](3, n).to(dtype)
        for k in {0, 1, n // 2, n - 1, n, n + 1}:
            assert_same_rows(scores, k)


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_long_rows(isa: str, rows: str, dtype: torch.dtype) -> None:
    """Long enough that a sample of the row sets the first bound."""
    scores = ROWS[rows](2, 70_001).to(dtype)
    for k in (1, 100, 1000, 4096):
        assert_same_rows(scores, k)


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
def test_a_million(isa: str, dtype: torch.dtype) -> None:
    scores = randn(1, MILLION, seed=2).to(dtype)
    for k in (1, 2048, 100_000, MILLION - 1):
        indices, counts = longctx.topk_select(scores, k)
        assert torch.equal(indices, stable_sort(scores, k))
        assert counts.tolist() == [k]


@pytest.mark.parametrize("stride", [16, 64, 100, 1024])
@pytest.mark.parametrize("phase", [0, 5])
def test_rows_that_mislead_any_sample(isa: str, stride: int, phase: int) -> None:
    """The best scores at regular places and in one block: too few or too many of them are in a regular sample."""
    scores = randn(1, 100_000, seed=3)
    scores[:, phase::stride] += 10
    for k in (100, 1000):
        assert torch.equal(longctx.topk_select(scores, k)[0], stable_sort(scores, k))
    block = randn(1, 100_000, seed=4)
    block[:, 50_000 : 50_000 + 16 * stride] += 10
    for k in (16 * stride // 2, 16 * stride + 5):
        assert torch.equal(longctx.topk_select(block, k)[0], stable_sort(block, k))


def test_a_bound_that_too_few_reach(isa: str) -> None:
    """Runs of a cache line make a sample unreliable: among many rows some bounds are too high, none shows."""
    lines = torch.randn(300, 5000, generator=generator(5))
    scores = lines.repeat_interleave(16, dim=-1) + torch.arange(16).repeat(5000) * 1e-4
    indices, _ = longctx.topk_select(scores, 128)
    assert torch.equal(indices, stable_sort(scores, 128))


def test_the_order_of_special_values() -> None:
    scores = torch.tensor([NAN, -INF, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, INF, NAN])
    best_first = [8, 7, 6, 4, 5, 3, 2, 1, 0, 9]
    for k in range(11):
        assert longctx.topk_select(scores, k)[0].tolist() == sorted(best_first[:k])


def test_flushed_denormals_change_nothing(isa: str) -> None:
    scores = ROWS["denormal"](2, 5000)
    expected = longctx.topk_select(scores, 50)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        assert_same_bits(longctx.topk_select(scores, 50), expected)
    finally:
        torch.set_flush_denormal(False)


# ---- lengths and forced indices


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
def test_lengths(isa: str, dtype: torch.dtype) -> None:
    lengths = int32(0, 1, 6, 7, 8, 500, 4999, 5000)
    scores = randn(8, 5000, dtype=dtype, seed=6)
    for row, length in enumerate(lengths.tolist()):
        scores[row, length:] = NAN if row % 2 else INF
    indices, counts = assert_same_rows(scores, 7, lengths=lengths)
    assert counts.tolist() == [0, 1, 6, 7, 7, 7, 7, 7]
    assert indices[2].tolist() == [0, 1, 2, 3, 4, 5, -1]
    assert_same_rows(scores, 7, lengths=lengths, num_first=3, num_last=4)
    assert_same_rows(scores, 7, lengths=int32(-5, 5001, 2**31 - 1, -(2**31), 9, 9, 9, 9))


@pytest.mark.parametrize("n", [0, 1, 5, 9, 10, 11, 3000])
def test_forced_indices(isa: str, n: int) -> None:
    scores = randn(3, n, seed=7)
    for num_first, num_last in ((0, 0), (4, 0), (0, 4), (4, 6), (10, 0), (0, 10), (1, 1)):
        indices, counts = assert_same_rows(scores, 10, num_first=num_first, num_last=num_last)
        assert counts.tolist() == [min(10, n)] * 3
        forced = {*range(min(num_first, n)), *range(max(0, n - num_last), n)}
        assert all(forced <= set(row) for row in indices.tolist())


def test_forced_indices_that_overlap() -> None:
    """In a short row the first and the last are the same ones: counted once."""
    scores = randn(2, 8, seed=8)
    for num_first, num_last in ((8, 8), (5, 6), (100, 0), (2**62, 2**62)):
        indices, _ = assert_same_rows(scores, 8, num_first=num_first, num_last=num_last)
        assert indices.tolist() == [list(range(8))] * 2
    assert_same_rows(randn(4, 20, seed=9), 12, lengths=int32(3, 8, 12, 20), num_first=5, num_last=7)


@pytest.mark.sanitize
@pytest.mark.parametrize("num_competing", [1, 10, 1000])
def test_mostly_forced(isa: str, num_competing: int) -> None:
    """A long row of which few places are left to compete for."""
    scores = randn(1, 100_000, seed=13)
    options = {"num_first": 20_000 - num_competing, "num_last": 5000}
    assert_same_rows(scores, 25_000, **options)


def test_forced_indices_need_room() -> None:
    scores = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="`k` must leave room for `num_first` and `num_last`; got 5"):
        longctx.topk_select(scores, 5, num_first=4, num_last=2)
    longctx.topk_select(scores, 6, num_first=4, num_last=2)
    longctx.topk_select(scores[:, :5], 5, num_first=4, num_last=2)  # no row has more than five


# ---- layout


def test_any_rows(isa: str) -> None:
    base = randn(6, 5, 4, 300, seed=10)
    expected = reference.topk_select(base, 9)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        view = base.permute(*order, 3)
        assert_same_bits(longctx.topk_select(view, 9), tuple(t.permute(*order, *range(3, t.dim())) for t in expected))
    assert_same_rows(base[:1, ::2, :, 7:].expand(3, -1, -1, -1), 9)
    assert_same_rows(base[1:4, 1, 3, 1:], 9)
    assert_same_rows(base.flatten()[5:1005], 9)
    assert_same_rows(base.flatten()[:192].view(1, 2, 1, 2, 1, 2, 1, 2, 12), 3)
    assert_same_rows(surround_with_nan(base), 9)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    indices, counts = assert_same_rows(torch.zeros(shape), 3)
    assert (indices.shape, counts.shape) == ((*shape[:-1], 3), shape[:-1])
    assert_same_rows(torch.zeros(shape), 0)


@pytest.mark.runs_on("cpu", reason="addresses beyond 32 bits: of memory that nobody touches")
def test_addresses_beyond_32_bits() -> None:
    far = 2**31 + 64
    storage = mmap.mmap(-1, 2 * (far + 5000), flags=UNTOUCHED)
    rows = torch.frombuffer(storage, dtype=torch.bfloat16).as_strided((2, 5000), (far, 1))
    rows.copy_(randn(2, 5000, seed=11))
    assert_same_bits(longctx.topk_select(rows, 50), longctx.topk_select(rows.contiguous(), 50))


@pytest.mark.runs_on("cpu", reason="thread counts: of the CPU kernels")
@pytest.mark.parametrize("rows", ["random", "ascending", "ties", "mostly NaN"])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_pieces_of_rows(isa: str, rows: str, num_rows: int) -> None:
    """With more threads than rows, threads share a row."""
    scores = ROWS[rows](num_rows, 300_001)
    lengths = torch.full((num_rows,), 250_003, dtype=torch.int32)
    lengths[-1] = 300_001
    options = {"lengths": lengths, "num_first": 3, "num_last": 5}
    before = torch.get_num_threads()
    try:
        for k in (8, 9, 700, 100_000):
            torch.set_num_threads(1)
            expected = assert_same_rows(scores, k, **options)
            for num_threads in (2, 3, 4):
                torch.set_num_threads(num_threads)
                for _ in range(2):
                    assert_same_bits(longctx.topk_select(scores, k, **options), expected)
    finally:
        torch.set_num_threads(before)


def test_indices_are_what_torch_topk_finds() -> None:
    scores = randn(4, 10_000, seed=12)
    indices, _ = longctx.topk_select(scores, 64)
    assert torch.equal(indices.long(), scores.topk(64).indices.sort(dim=-1).values)
