"""attention_mass against the float64 twin, and the identities that tie it to attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import longctx
from checks import record
from longctx import reference
from longctx.testing import surround_with_nan

# The mass of a key is a sum of probabilities, each exp of a difference of rounded numbers.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
DTYPES = list(TOLERANCE)


def make(
    batch: int, heads: tuple[int, int], seqlens: tuple[int, int], dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], seqlens[0], dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, heads[1], seqlens[1], dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def exact_lse(q: Tensor, k: Tensor, **options: object) -> Tensor:
    lse = reference.attention(q.double(), k.double(), k.double(), **options)[1]
    return lse if q.dtype == torch.float64 else lse.float()


def check(q: Tensor, k: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    lse_options = {name: value for name, value in options.items() if name not in ("segment_offsets", "sinks")}
    lse = exact_lse(q, k, **lse_options)
    actual = longctx.attention_mass(q, k, lse, reduce="both", **options)
    expected = reference.attention_mass(q, k, lse, reduce="both", **options)
    tolerance = TOLERANCE[q.dtype]
    for name, a, e in zip(("key", "diagonal"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    record("attention_mass", q.dtype, q.shape[3])
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "seqlens", "dim"),
    [
        (1, (1, 1), (1, 1), 1),
        (2, (4, 2), (33, 70), 64),
        (1, (6, 1), (5, 600), 40),
        (1, (2, 2), (300, 1100), 32),
        (1, (3, 3), (70, 33), 16),
    ],
)
def test_matches_the_twin(
    batch: int, heads: tuple[int, int], seqlens: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    q, k = make(batch, heads, seqlens, dim, dtype)
    check(q, k)
    check(q, k, causal=False, softmax_scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 48, 64, 128, 300])
def test_every_instruction_set(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k = make(1, (4, 2), (130, 530), head_dim, dtype)
    check(q, k, window_size_left=200, num_sink_tokens=3)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size_left": 10},
        {"window_size_left": 0, "num_sink_tokens": 4},
        {"causal": False, "window_size_left": 7, "window_size_right": 3},
        {"softcap": 5.0},
        {"sinks": torch.tensor([0.0, 5.0, -3.0, 1.0])},
    ],
)
def test_options(options: dict[str, object]) -> None:
    q, k = make(2, (4, 2), (50, 90), 32, torch.float32)
    check(q, k, **options)


def test_key_ranges() -> None:
    q, k = make(2, (2, 1), (40, 60), 16, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for num_ranges in (1, 2):
        ranges = torch.randint(0, 61, (2, num_ranges, 40, 2), generator=generator, dtype=torch.int32)
        check(q, k, key_ranges=ranges)
        check(q, k, key_ranges=ranges, causal=False)


def test_packed_with_empty_sequences() -> None:
    lens_q, lens_k = [3, 0, 40, 1, 20], [30, 5, 40, 0, 10]
    cu_q = torch.tensor([0, *itertools.accumulate(lens_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *itertools.accumulate(lens_k)], dtype=torch.int32)
    q, k = make(1, (4, 2), (sum(lens_q), sum(lens_k)), 16, torch.float32)
    by_key, by_diagonal = check(q, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for s, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        q_begin, k_begin = int(cu_q[s]), int(cu_k[s])
        one_q, one_k = q[:, :, q_begin : q_begin + len_q], k[:, :, k_begin : k_begin + len_k]
        key, diagonal = longctx.attention_mass(one_q, one_k, exact_lse(one_q, one_k), reduce="both")
        torch.testing.assert_close(by_key[..., k_begin : k_begin + len_k], key)
        first = q_begin + k_begin
        torch.testing.assert_close(by_diagonal[..., first : first + diagonal.shape[-1]], diagonal)


def test_static_cache() -> None:
    q, k = make(3, (2, 1), (10, 50), 16, torch.float32)
    used = torch.tensor([0, 7, 50], dtype=torch.int32)
    by_key, by_diagonal = check(q, k, seqused_k=used)
    assert not by_key[0].any()
    assert not by_key[1, :, 7:].any()
    assert not by_diagonal[1, :, 7:].any()  # own positions lie on diagonal seqused_k - 1


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strided_between_nan(layout: str) -> None:
    q, k = make(2, (4, 2), (40, 100), 24, torch.float32)
    lse = exact_lse(q, k)
    expected = longctx.attention_mass(q, k, lse, reduce="both")
    strided = [surround_with_nan(tensor, layout=layout) for tensor in (q, k)]
    actual = longctx.attention_mass(*strided, lse, reduce="both")
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_nan_in_keys_that_nobody_sees() -> None:
    q, k = make(1, (2, 1), (8, 64), 16, torch.float32)
    options = {"window_size_left": 20, "num_sink_tokens": 2}
    lse = exact_lse(q, k, **options)
    expected = longctx.attention_mass(q, k, lse, reduce="both", **options)
    k[:, :, 2:30] = float("nan")
    actual = longctx.attention_mass(q, k, lse, reduce="both", **options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_mass_is_conserved() -> None:
    q, k = make(1, (8, 2), (128, 2000), 64, torch.bfloat16)
    _, lse = longctx.attention(q, k, k)
    by_key, by_diagonal = longctx.attention_mass(q, k, lse, reduce="both")
    torch.testing.assert_close(by_key.sum(-1), torch.full((1, 8), 128.0), atol=0.1, rtol=0)
    torch.testing.assert_close(by_diagonal.sum(-1), by_key.sum(-1), atol=1e-2, rtol=0)
    assert not by_diagonal[..., 2000:].any()


def test_diagonal_counts_distance_from_the_own_position() -> None:
    k = 20.0 * torch.eye(64)[None, None]
    distance = 5
    positions = torch.arange(44, 64)
    q = k[:, :, positions - distance]
    lse = exact_lse(q, k)
    by_diagonal = longctx.attention_mass(q, k, lse, reduce="diagonal")
    assert int(by_diagonal.argmax()) == 64 - 1 - distance
    assert float(by_diagonal.max()) > 19.9


def test_computes_the_lse_it_is_not_given() -> None:
    q, k = make(2, (4, 2), (40, 90), 16, torch.float32)
    for options in ({}, {"causal": False, "softcap": 3.0}, {"window_size_left": 9, "sinks": torch.ones(4)}):
        lse_options = {name: value for name, value in options.items() if name != "sinks"}
        _, lse = longctx.attention(q, k, k, **lse_options)
        given = longctx.attention_mass(q, k, lse, **options)
        torch.testing.assert_close(longctx.attention_mass(q, k, **options), given)


def test_segments() -> None:
    q, k = make(2, (4, 2), (20, 90), 16, torch.float32)
    for offsets in ([0, 90], [5, 5, 30, 89], [0]):
        check(q, k, segment_offsets=torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0), (0, 0)])
def test_empty(seqlens: tuple[int, int]) -> None:
    q, k = make(1, (2, 1), seqlens, 8, torch.float32)
    by_key, by_diagonal = check(q, k)
    assert not by_key.any()
    assert not by_diagonal.any()
    check(q[:0], k[:0])


@pytest.mark.runs_on("cpu", reason="thread counts: of the CPU kernels")
def test_result_does_not_depend_on_threads() -> None:
    q, k = make(1, (2, 1), (100, 3000), 32, torch.float32)
    lse = exact_lse(q, k)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(longctx.attention_mass(q, k, lse, reduce="both"))
    torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_opcheck_compile_and_gradient() -> None:
    q, k = make(1, (2, 1), (8, 20), 16, torch.float32)
    lse = exact_lse(q, k)
    segments = torch.tensor([0, 4, 20], dtype=torch.int32)
    for args in ((q, k, lse), (q, k, lse, segments, "both"), (q, k, lse, None, "diagonal")):
        torch.library.opcheck(torch.ops.longctx.attention_mass.default, args)

    def mass(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return longctx.attention_mass(q, k, lse, reduce="both", window_size_left=9)

    for a, e in zip(torch.compile(mass, fullgraph=True)(q, k, lse), mass(q, k, lse), strict=True):
        assert torch.equal(a, e)
    with pytest.raises(NotImplementedError, match="longctx::attention_mass has no backward yet"):
        longctx.attention_mass(q.clone().requires_grad_(), k, lse).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lse": torch.zeros(1, 2, 9)}, r"`lse` must have shape .* = \[1, 2, 8\]; got \[1, 2, 9\]"),
        ({"lse": torch.zeros(1, 2, 8).double()}, "`lse` must have dtype float32; got float64"),
        ({"k": torch.zeros(1, 1, 20, 9)}, r"`k` must have shape .* = \[1, \*, \*, 16\]"),
        ({"k": torch.zeros(1, 3, 20, 16)}, "`k` must have a number of heads that divides"),
        ({"q": torch.zeros(1, 2, 8, 16).int()}, "`q` must have dtype float32, float64, bfloat16 or float16"),
        ({"reduce": "row"}, "`reduce` must be 'key', 'diagonal' or 'both'; got 'row'"),
        ({"segment_offsets": torch.zeros(2)}, "`segment_offsets` must have dtype int32"),
        ({"segment_offsets": torch.zeros(0).int()}, "`segment_offsets` must hold at least one offset"),
        ({"segment_offsets": torch.zeros(2).int(), "reduce": "diagonal"}, "`segment_offsets` must be None"),
        ({"sinks": torch.zeros(3)}, r"`sinks` must have shape \[num_q_heads\] = \[2\]"),
        ({"softcap": -1.0}, "`softcap` must not be negative"),
        ({"softmax_scale": float("inf")}, "`softmax_scale` must be finite"),
        ({"window_size_left": -2}, "`window_size_left` must be a number of keys"),
        ({"page_table": torch.zeros(1, 1).int()}, "`page_table` must be None"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    q, k = make(1, (2, 1), (8, 20), 16, torch.float32)
    arguments = {"q": q, "k": k, "lse": torch.zeros(1, 2, 8)}
    with pytest.raises(ValueError, match=f"longctx::attention_mass: {message}"):
        longctx.attention_mass(**{**arguments, **options})


@pytest.mark.sanitize
def test_bad_values_stay_inside_the_tensors() -> None:
    q, k = make(1, (2, 1), (8, 20), 16, torch.float32)
    lse = torch.zeros(1, 2, 8)
    huge = 2**31 - 1
    for values in ([3, -9, huge, 1], [0, 0, 9000, 20]):
        offsets = torch.tensor(values, dtype=torch.int32)
        longctx.attention_mass(q, k, lse, segment_offsets=offsets)
        longctx.attention_mass(q, k, lse, reduce="both", cu_seqlens_q=offsets, cu_seqlens_k=offsets.flip(0))
        with pytest.raises(ValueError, match="`segment_offsets` must be"):
            longctx.attention_mass(q, k, lse, segment_offsets=offsets, validate=True)
    for used in (-3, huge):
        longctx.attention_mass(q, k, lse, reduce="both", seqused_k=torch.tensor([used], dtype=torch.int32))
    ranges = torch.tensor([-huge, huge], dtype=torch.int32).expand(1, 2, 8, 2)
    longctx.attention_mass(q, k, lse, reduce="both", key_ranges=ranges)
