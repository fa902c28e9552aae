"""block_scores against the float64 twin, and what its docstring promises about rows and slabs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import longctx
from checks import record
from longctx import reference
from longctx.testing import surround_with_nan

METHODS = ["mean", "max_mean", "antidiagonal"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Only `max_mean` rounds anything but the result: its means, to q's dtype.
ROUNDED_MEANS = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(
    batch: int, heads: tuple[int, int], seqlens: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads[0], seqlens[0], dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, heads[1], seqlens[1], dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def check(q: Tensor, k: Tensor, *sizes: int, **options: object) -> Tensor:
    for softmax in (True, False):
        actual = longctx.block_scores(q, k, *sizes, softmax=softmax, **options)
        expected = reference.block_scores(q, k, *sizes, softmax=softmax, **options)
        assert actual.dtype == torch.float32
        tolerance = ROUNDED_MEANS[q.dtype] if options.get("method") == "max_mean" else 2e-5
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        if softmax:
            result = actual
    record("block_scores", q.dtype, q.shape[3])
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "seqlens", "dim"),
    [
        (1, (1, 1), (1, 1), 1),
        (2, (4, 2), (130, 130), 64),
        (1, (3, 1), (70, 300), 40),
        (1, (2, 2), (100, 50), 16),  # the first queries see no key
    ],
)
def test_matches_the_twin(
    method: str, dtype: torch.dtype, batch: int, heads: tuple[int, int], seqlens: tuple[int, int], dim: int
) -> None:
    q, k = make(batch, heads, seqlens, dim, dtype)
    check(q, k, 32, 16, method=method, stride=8)
    check(q, k, 64, 64, method=method, stride=16, causal=False, softmax_scale=0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 48, 64, 128, 300])
def test_every_instruction_set(isa: str, method: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k = make(1, (2, 1), (333, 333), head_dim, dtype)
    check(q, k, 64, 64, method=method)


@pytest.mark.parametrize("method", ["mean", "max_mean"])
@pytest.mark.parametrize("sizes", [(16, 1), (16, 128), (128, 8), (64, 32)])
def test_block_sizes(method: str, sizes: tuple[int, int]) -> None:
    q, k = make(1, (2, 1), (201, 230), 16)
    check(q, k, *sizes, method=method)


@pytest.mark.parametrize(
    ("sizes", "stride"), [((16, 16), 16), ((128, 64), 1), ((128, 128), 2), ((64, 128), 64), ((16, 1), 1)]
)
def test_strides(sizes: tuple[int, int], stride: int) -> None:
    q, k = make(1, (2, 1), (201, 230), 8)
    check(q, k, *sizes, method="antidiagonal", stride=stride)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_sum_to_one(method: str, causal: bool) -> None:
    q, k = make(1, (2, 2), (3000, 3000), 16)
    scores = longctx.block_scores(q, k, 32, 16, method=method, causal=causal)
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 2, 94), atol=1e-5, rtol=0)
    if causal:
        last = (torch.arange(94) + 1) * 2 - 1
        assert not scores[..., torch.arange(188) > last[:, None]].any()


@pytest.mark.parametrize("method", METHODS)
def test_long_rows_match_the_definition(method: str) -> None:
    """Several chunks of keys and several passes of queries, checked without the slow twin."""
    q, k = make(1, (2, 1), (4500, 9200), 8)
    actual = longctx.block_scores(q, k, 16, 8, method=method, stride=8, softmax=False, causal=False)
    q_blocks = [*q.double().split(16, dim=2)]
    k_means = torch.stack([block.mean(2) for block in k.double().split(8, dim=2)], dim=2)
    if method == "antidiagonal":
        q_rows = q[:, :, :4496].double().unflatten(2, (-1, 8)).flip(3).flatten(3)
        k_rows = k.double().unflatten(2, (-1, 8)).flatten(3)
        squares = q_rows @ k_rows.mT * (8**-0.5 / 8)
        expected = squares.unflatten(2, (-1, 2)).mean(3)
        actual = actual[:, :, : expected.shape[2]]
    elif method == "mean":
        expected = torch.stack([b.mean(2) for b in q_blocks], 2) @ k_means.mT * 8**-0.5
    else:
        expected = torch.stack([(b @ k_means.mT).amax(2) for b in q_blocks], 2) * 8**-0.5
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_packed_with_empty_sequences(method: str) -> None:
    lens_q, lens_k = [20, 0, 5, 33, 16], [40, 9, 5, 70, 0]
    cu_q = torch.tensor([0, *itertools.accumulate(lens_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *itertools.accumulate(lens_k)], dtype=torch.int32)
    q, k = make(1, (2, 1), (sum(lens_q), sum(lens_k)), 16)
    options = {"method": method, "stride": 8}
    packed = check(q, k, 16, 8, **options, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert packed.shape[2:] == (-(-sum(lens_q) // 16) + 5, -(-sum(lens_k) // 8))
    row = 0
    for s, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        one_q, one_k = q[:, :, cu_q[s] : cu_q[s] + len_q], k[:, :, cu_k[s] : cu_k[s] + len_k]
        alone = longctx.block_scores(one_q, one_k, 16, 8, **options)
        rows = packed[:, :, row : row + alone.shape[2]]
        torch.testing.assert_close(rows[..., : alone.shape[3]], alone)
        assert not rows[..., alone.shape[3] :].any()
        row += alone.shape[2]
    assert not packed[:, :, row:].any()


@pytest.mark.parametrize("method", METHODS)
def test_static_cache_and_unused_nan(method: str) -> None:
    q, k = make(3, (2, 1), (20, 64), 16)
    used = torch.tensor([0, 37, 64], dtype=torch.int32)
    for b in range(3):
        k[b, :, used[b] :] = float("nan")
    check(q, k, 16, 16, method=method, seqused_k=used)
    check(q, k, 16, 16, method=method, seqused_k=used, q_offset=-25)


@pytest.mark.parametrize("method", METHODS)
def test_slabs_and_chunked_prefill_equal_the_whole(method: str) -> None:
    q, k = make(1, (2, 1), (200, 300), 16)
    whole = longctx.block_scores(q, k, 32, 16, method=method, stride=4)
    for begin, end in ((0, 64), (64, 200)):
        slab = longctx.block_scores(q[:, :, begin:end], k, 32, 16, method=method, stride=4, q_offset=300 - 200 + begin)
        rows = whole[:, :, begin // 32 : -(-end // 32)]
        torch.testing.assert_close(slab, rows)
        cut = 300 - 200 + end
        chunk = longctx.block_scores(q[:, :, begin:end], k[:, :, :cut], 32, 16, method=method, stride=4)
        if cut % 16 == 0 or end == 200:
            torch.testing.assert_close(chunk, rows[..., : chunk.shape[3]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strided_between_nan(method: str, layout: str) -> None:
    q, k = make(2, (4, 2), (70, 100), 24)
    expected = longctx.block_scores(q, k, 32, 32, method=method)
    strided = [surround_with_nan(tensor, layout=layout) for tensor in (q, k)]
    assert torch.equal(longctx.block_scores(*strided, 32, 32, method=method), expected)


@pytest.mark.parametrize("method", METHODS)
def test_empty(method: str) -> None:
    for batch, seqlens in ((1, (0, 40)), (1, (40, 0)), (1, (0, 0)), (0, (5, 5))):
        q, k = make(batch, (2, 1), seqlens, 8)
        check(q, k, 16, 16, method=method)


def test_antidiagonal_finds_a_vertical_line() -> None:
    """What the method is for: keys that all queries like score high in whole columns of blocks."""
    q, k = make(1, (1, 1), (1024, 1024), 32)
    q += 1.0
    k[:, :, 300:310] += 1.0
    scores = longctx.block_scores(q, k, 128, 128, method="antidiagonal", stride=8)
    assert scores[0, 0, 3:].argmax(-1).eq(300 // 128).all()


@pytest.mark.runs_on("cpu", reason="thread counts: of the CPU kernels")
@pytest.mark.parametrize("method", METHODS)
def test_result_does_not_depend_on_threads(method: str) -> None:
    q, k = make(1, (2, 1), (700, 700), 32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(longctx.block_scores(q, k, 16, 16, method=method))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_opcheck_compile_and_gradient() -> None:
    q, k = make(1, (2, 1), (40, 40), 16)
    cu = torch.tensor([0, 10, 40], dtype=torch.int32)
    for args in ((q, k), (q, k, 16, 8, "antidiagonal", False, True, 0.1, 4, None, cu, cu)):
        torch.library.opcheck(torch.ops.longctx.block_scores.default, args)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return longctx.block_scores(q, k, 16, 16, method="max_mean")

    assert torch.equal(torch.compile(scores, fullgraph=True)(q, k), scores(q, k))
    with pytest.raises(NotImplementedError, match="longctx::block_scores has no backward yet"):
        longctx.block_scores(q.clone().requires_grad_(), k).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": torch.zeros(2, 40, 16)}, r"`q` must have shape \[batch, num_q_heads, seqlen_q, head_dim\]"),
        ({"k": torch.zeros(1, 1, 40, 8)}, r"`k` must have shape .* = \[1, \*, \*, 16\]; got \[1, 1, 40, 8\]"),
        ({"k": torch.zeros(1, 1, 40, 16).half()}, "`k` must have dtype float32; got float16"),
        ({"k": torch.zeros(1, 3, 40, 16)}, "`k` must have a number of heads that divides"),
        ({"k": torch.zeros(1, 1, 16, 40).mT}, "`k` must be contiguous in its last dim"),
        ({"block_size_q": 100}, "`block_size_q` must be 16, 32, 64 or 128; got 100"),
        ({"block_size_k": -8}, "`block_size_k` must be 1, 8, 16, 32, 64 or 128; got -8"),
        ({"method": "median"}, "`method` must be 'mean', 'max_mean' or 'antidiagonal'; got 'median'"),
        ({"method": "antidiagonal", "stride": 0}, "`stride` must divide both block sizes; got 0"),
        ({"method": "antidiagonal", "block_size_k": 8}, "`stride` must divide both block sizes; got 16"),
        ({"softmax_scale": float("nan")}, "`softmax_scale` must be finite"),
        ({"q_offset": -(2**50)}, "`q_offset` must be a key position"),
        ({"cu_seqlens_k": torch.zeros(2).int()}, "`cu_seqlens_q` must be given with"),
        ({"seqused_k": torch.zeros(2).int()}, r"`seqused_k` must have shape \[batch\] = \[1\]"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    q, k = make(1, (2, 1), (40, 40), 16)
    with pytest.raises(ValueError, match=f"longctx::block_scores: {message}"):
        longctx.block_scores(**{"q": q, "k": k, **options})


@pytest.mark.sanitize
@pytest.mark.parametrize("method", METHODS)
def test_bad_values_stay_inside_the_tensors(method: str) -> None:
    q, k = make(1, (2, 1), (40, 40), 16)
    huge = 2**31 - 1
    for values in ([3, -9, huge, 1], [0, 0, 9000, 20], [0, huge, 0, huge]):
        offsets = torch.tensor(values, dtype=torch.int32)
        longctx.block_scores(q, k, 16, 16, method=method, cu_seqlens_q=offsets, cu_seqlens_k=offsets.flip(0))
    for used in (-3, huge):
        longctx.block_scores(q, k, method=method, seqused_k=torch.tensor([used], dtype=torch.int32))
