"""select_blocks: the same lists as the twin, bit for bit, and the guarantees its docstring gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import longctx
from checks import record
from longctx import reference

METHODS = {
    "top_k": (0, 1, 3, 1000),
    "threshold": (0.0, 0.02, 0.5),
    "relative": (0.0, 0.3, 1.0),
    "cumulative": (0.0, 0.5, 0.9, 1.0),
}
CASES = [(method, value) for method, values in METHODS.items() for value in values]


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(shape, generator=generator), dim=-1)


def assert_same_list(scores: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    actual = longctx.select_blocks(scores, **options)
    expected = reference.select_blocks(scores, **options)
    assert actual[0].dtype == torch.int64
    assert actual[1].dtype == torch.int32
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    record("select_blocks", scores.dtype)
    return actual


def rows_of(blocks: tuple[Tensor, Tensor]) -> list[list[int]]:
    """The lists of all (batch, head, row), in order."""
    indptr, indices = blocks
    return [
        indices[first:last].tolist()
        for ends in indptr.flatten(0, 1).tolist()
        for first, last in itertools.pairwise(ends)
    ]


@pytest.mark.parametrize(("method", "value"), CASES)
@pytest.mark.parametrize("scope", ["row", "head"])
def test_matches_the_twin(method: str, value: float, scope: str) -> None:
    for shape in [(1, 1, 1, 1), (2, 3, 5, 5), (1, 2, 7, 19), (1, 1, 1, 300)]:
        scores = random_scores(*shape)
        options = {"method": method, "value": value, "scope": scope}
        assert_same_list(scores, **options, q_offset=(shape[3] - shape[2]) * 128)
        assert_same_list(scores, **options, causal=False, num_first=2, num_local=1)
        assert_same_list(scores, **options, num_first=1, num_local=2, max_blocks_per_row=4)


@pytest.mark.parametrize(("method", "value"), CASES)
@pytest.mark.parametrize("scope", ["row", "head"])
@pytest.mark.parametrize(
    "adversary",
    ["constant", "zeros", "ties", "specials", "huge_range", "subnormal", "negative", "all_nan", "all_inf"],
)
def test_adversarial_scores(adversary: str, method: str, value: float, scope: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 2, 9, 33)
    scores = {
        "constant": lambda: torch.full(shape, 1 / 3),
        "zeros": lambda: torch.zeros(shape) * torch.randn(shape, generator=generator).sign(),
        "ties": lambda: torch.randint(0, 3, shape, generator=generator) / 7,
        "specials": lambda: torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.5])[
            torch.randint(0, 6, shape, generator=generator)
        ],
        "huge_range": lambda: torch.exp(80 * torch.randn(shape, generator=generator)),
        "subnormal": lambda: torch.rand(shape, generator=generator) * 1e-40,
        "negative": lambda: -torch.rand(shape, generator=generator),
        "all_nan": lambda: torch.full(shape, float("nan")),
        "all_inf": lambda: torch.full(shape, float("inf")),
    }[adversary]()
    options = {"method": method, "value": value, "scope": scope, "q_offset": 24 * 128}
    assert_same_list(scores, **options)
    assert_same_list(scores, **options, num_first=1, num_local=1, max_blocks_per_row=5)


@pytest.mark.parametrize("block_size_q", [16, 32, 64, 128])
@pytest.mark.parametrize("block_size_k", [1, 8, 16, 32, 64, 128])
def test_causal_rule_for_every_block_size(block_size_q: int, block_size_k: int) -> None:
    scores = random_scores(1, 1, 4, 70)
    for q_offset in (-200, -1, 0, 5, 900):
        options = {"block_size_q": block_size_q, "block_size_k": block_size_k, "q_offset": q_offset}
        rows = rows_of(assert_same_list(scores, method="top_k", value=70, **options))
        for i, row in enumerate(rows):
            last = (q_offset + (i + 1) * block_size_q - 1) // block_size_k
            assert row == list(range(min(last + 1, 70)))


@pytest.mark.parametrize(("method", "value"), CASES)
@pytest.mark.parametrize("scope", ["row", "head"])
def test_packed_sequences_match_the_twin_and_single_sequences(method: str, value: float, scope: str) -> None:
    lens_q, lens_k = [40, 0, 5, 16, 33], [40, 9, 30, 0, 70]
    cu_q = torch.tensor([0, *itertools.accumulate(lens_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *itertools.accumulate(lens_k)], dtype=torch.int32)
    num_rows = -(-sum(lens_q) // 16) + len(lens_q)
    num_k_blocks = -(-sum(lens_k) // 8)
    scores = random_scores(1, 2, num_rows, num_k_blocks)
    options = {"method": method, "value": value, "scope": scope, "num_first": 1, "num_local": 1}
    options |= {"block_size_q": 16, "block_size_k": 8}
    packed = rows_of(assert_same_list(scores, **options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k))
    first_row = 0
    for len_q, len_k in zip(lens_q, lens_k, strict=True):
        rows, columns = -(-len_q // 16), -(-len_k // 8)
        alone = scores[:, :, first_row : first_row + rows, :columns]
        blocks = longctx.select_blocks(alone, **options, q_offset=len_k - len_q)
        expected = rows_of(blocks)
        assert packed[first_row : first_row + rows] == expected[:rows]
        first_row += rows
    assert all(row == [] for row in packed[first_row:num_rows])


def test_static_cache() -> None:
    scores = random_scores(3, 2, 3, 12)
    used = torch.tensor([0, 100, 192], dtype=torch.int32)
    options = {"block_size_q": 16, "block_size_k": 16, "q_offset": -40}
    blocks = assert_same_list(scores, method="top_k", value=99, seqused_k=used, **options)
    rows = rows_of(blocks)
    assert rows[:6] == [[]] * 6
    assert rows[8] == list(range(7))  # 100 keys are 7 blocks of 16
    assert rows[12] == list(range(11))  # query row 15 stands at 192 - 40 + 15 = 167


def test_value_per_head() -> None:
    scores = random_scores(2, 3, 6, 6)
    for value in (torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)):
        blocks = assert_same_list(scores, method="top_k", value=value)
        last_rows = rows_of(blocks)[5::6]
        assert [len(row) for row in last_rows] == [0, 2, 5, 0, 2, 5]
    assert_same_list(scores, method="cumulative", value=torch.tensor([0.1, 0.5, 1.0]), scope="head")


def test_strided_and_expanded_scores() -> None:
    base = random_scores(6, 3, 2, 20)
    strided = base.transpose(0, 2)[..., 3:17]
    assert not strided.is_contiguous()
    assert_same_list(strided, method="cumulative", value=0.8, causal=False)
    assert_same_list(base[:1].expand(4, -1, -1, -1), method="top_k", value=3, causal=False)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    indptr, _ = assert_same_list(torch.zeros(shape), method="top_k", value=2)
    assert indptr.shape == (*shape[:2], shape[2] + 1)
    assert not indptr.any()


def test_cumulative_keeps_at_least_the_asked_share() -> None:
    scores = random_scores(1, 4, 16, 64, seed=3)
    for value in (0.3, 0.9, 0.99):
        rows = rows_of(longctx.select_blocks(scores, method="cumulative", value=value, causal=False))
        for row_scores, row in zip(scores.flatten(0, 2).double(), rows, strict=True):
            kept = row_scores[row].sum() / row_scores.sum()
            without_last = kept - row_scores[row].min() / row_scores.sum()
            assert kept >= value - 1e-6
            assert without_last < value


def test_overflow_keeps_the_best() -> None:
    scores = random_scores(1, 2, 8, 40, seed=5)
    blocks = longctx.select_blocks(scores, method="threshold", value=0.0, causal=False, max_blocks_per_row=6)
    for row_scores, row in zip(scores.flatten(0, 2), rows_of(blocks), strict=True):
        assert row == sorted(row_scores.topk(6).indices.tolist())


def test_nan_outside_the_visible_part_is_never_read() -> None:
    scores = random_scores(1, 1, 6, 6)
    visible = torch.ones(6, 6).tril().bool()
    for method, value in CASES:
        for scope in ("row", "head"):
            options = {"method": method, "value": value, "scope": scope}
            clean = longctx.select_blocks(scores, **options)
            dirty = longctx.select_blocks(scores.masked_fill(~visible, float("inf")), **options)
            assert torch.equal(clean[0], dirty[0])
            assert torch.equal(clean[1], dirty[1])


@pytest.mark.runs_on("cpu", reason="thread counts: of the CPU kernels")
def test_result_does_not_depend_on_threads() -> None:
    scores = random_scores(2, 3, 40, 40)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(longctx.select_blocks(scores, method="cumulative", value=0.7, scope="head"))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_large_map() -> None:
    scores = random_scores(1, 1, 600, 600)
    for scope in ("row", "head"):
        for method, value in (("cumulative", 0.95), ("top_k", 5000 if scope == "head" else 50)):
            assert_same_list(scores, method=method, value=value, scope=scope, num_first=1, num_local=1)


def test_block_list_is_accepted_by_the_attention_op() -> None:
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    options = {"block_size_q": 64, "block_size_k": 32}
    scores = longctx.block_scores(q, k, **options)
    blocks = longctx.select_blocks(scores, method="cumulative", value=1.0, num_local=2, **options)
    out, _ = longctx.block_sparse_attention(q, k, v, *blocks, 64, 32, validate=True)
    torch.testing.assert_close(out, longctx.attention(q, k, v)[0], atol=1e-5, rtol=1e-5)


def test_opcheck_and_compile() -> None:
    scores = random_scores(2, 2, 5, 9)
    cu = torch.tensor([0, 30, 60], dtype=torch.int32)
    arguments = [
        (scores, "top_k", 3.0),
        (scores, "cumulative", 0.0, torch.tensor([0.5, 0.9]), "head", 1, 1, False, 16, 8, 0, 4),
        (scores[:1], "relative", 0.5, None, "row", 0, 0, True, 16, 8, 0, None, cu, cu),
    ]
    for args in arguments:
        torch.library.opcheck(torch.ops.longctx.select_blocks.default, args)

    def select(scores: Tensor) -> tuple[Tensor, Tensor]:
        return longctx.select_blocks(scores, method="cumulative", value=0.9, num_first=1)

    for actual, expected in zip(torch.compile(select, fullgraph=True)(scores), select(scores), strict=True):
        assert torch.equal(actual, expected)


GOOD = {"method": "top_k", "value": 1.0}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.zeros(2, 2, 2), {}, r"`scores` must have shape \[batch, heads, num_q_blocks, num_k_blocks\]"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.float64), {}, "`scores` must have dtype float32; got float64"),
        (torch.zeros(1, 1, 2, 2).mT, {}, "`scores` must be contiguous in its last dim"),
        (torch.zeros(1, 1, 2, 2), {"method": "best"}, "`method` must be 'top_k', .*; got 'best'"),
        (torch.zeros(1, 1, 2, 2), {"scope": "all"}, "`scope` must be 'row' or 'head'; got 'all'"),
        (torch.zeros(1, 1, 2, 2), {"value": float("nan")}, "`value` must not be NaN"),
        (torch.zeros(1, 1, 2, 2), {"value": torch.zeros(3)}, r"`value` must have shape \[heads\] = \[1\]"),
        (torch.zeros(1, 1, 2, 2), {"num_first": -1}, "`num_first` must not be negative; got -1"),
        (torch.zeros(1, 1, 2, 2), {"num_local": -1}, "`num_local` must not be negative; got -1"),
        (torch.zeros(1, 1, 2, 2), {"block_size_q": 48}, "`block_size_q` must be 16, 32, 64 or 128; got 48"),
        (torch.zeros(1, 1, 2, 2), {"block_size_k": 0}, "`block_size_k` must be 1, 8, .*; got 0"),
        (torch.zeros(1, 1, 2, 2), {"q_offset": 2**60}, "`q_offset` must be a key position"),
        (torch.zeros(1, 1, 2, 2), {"max_blocks_per_row": 0}, "`max_blocks_per_row` must be at least 1; got 0"),
        (torch.zeros(1, 1, 2, 2), {"max_blocks_per_row": 1, "num_first": 2}, "leave room for `num_first`"),
        (torch.zeros(1, 1, 2, 2), {"cu_seqlens_q": torch.zeros(2).int()}, "`cu_seqlens_k` must be given with"),
        (torch.zeros(1, 1, 2, 2), {"seqused_k": torch.zeros(1)}, "`seqused_k` must have dtype int32"),
        (torch.zeros(2, 1, 2, 2), {"seqused_k": torch.zeros(3).int()}, r"`seqused_k` must have shape \[batch\]"),
    ],
)
def test_bad_input(scores: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"longctx::select_blocks: .*{message}"):
        longctx.select_blocks(scores, **{**GOOD, **options})


def test_packed_needs_batch_one_and_no_offset() -> None:
    cu = torch.tensor([0, 100], dtype=torch.int32)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    with pytest.raises(ValueError, match="`scores` must have batch 1 when sequences are packed"):
        longctx.select_blocks(torch.zeros(2, 1, 2, 2), **GOOD, **packed)
    with pytest.raises(ValueError, match="`q_offset` must not be combined with packed sequences"):
        longctx.select_blocks(torch.zeros(1, 1, 2, 2), **GOOD, **packed, q_offset=1)


@pytest.mark.sanitize
def test_bad_values_stay_inside_the_tensors() -> None:
    scores = random_scores(1, 2, 5, 5)
    for values in ([5, 3, 900, -7], [0, 2**31 - 1, -(2**31), 640], [7, 7, 7, 7]):
        cu = torch.tensor(values, dtype=torch.int32)
        indptr, indices = longctx.select_blocks(scores, **GOOD, cu_seqlens_q=cu, cu_seqlens_k=cu.flip(0))
        assert 0 <= int(indptr.min()) <= int(indptr.max()) <= indices.numel()
        assert int(indices.max()) < 5
    for used in (-5, 2**31 - 1):
        longctx.select_blocks(scores, **GOOD, seqused_k=torch.tensor([used], dtype=torch.int32))
    bad = torch.tensor([0, 9, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="`cu_seqlens_q` must be non-decreasing"):
        longctx.select_blocks(scores, **GOOD, cu_seqlens_q=bad, cu_seqlens_k=bad, validate=True)
