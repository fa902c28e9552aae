"""`attention` against its float64 twin."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import longctx
from checks import assert_equal_to_rounding, check_attention
from longctx.testing import surround_with_nan
from op_case import DTYPES, Call, generator, int32, qkv, randn
from prefill_cases import random_ranges

HEAD_DIMS = (1, 7, 64, 80, 96, 128, 192, 256, 300)
# Around the sizes of a strip (32 queries), a key tile (32 keys) and a chunk (512 keys).
LENGTHS = (
    (0, 0),
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 64),
    (3, 1),
    (7, 3),
    (31, 33),
    (32, 32),
    (33, 65),
    (65, 600),
    (70, 1100),
)

OPTIONS: dict[str, Call] = {
    "not causal": {"causal": False},
    "scale": {"softmax_scale": 0.7},
    "negative scale": {"softmax_scale": -0.2},
    "window left": {"window_size_left": 9},
    "window of one": {"window_size_left": 0, "window_size_right": 0},
    "window right": {"causal": False, "window_size_right": 3},
    "window both": {"causal": False, "window_size_left": 40, "window_size_right": 11},
    "window right under causal": {"window_size_left": 12, "window_size_right": 2},
    "sink tokens": {"window_size_left": 9, "num_sink_tokens": 4},
    "sink tokens without window": {"num_sink_tokens": 4},
    "sink tokens past a right window": {"causal": False, "window_size_right": 0, "num_sink_tokens": 130},
    "more sink tokens than keys": {"window_size_left": 0, "num_sink_tokens": 10_000},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": randn(4, seed=1)},
    "sinks of -inf": {"sinks": torch.full((4,), -torch.inf)},
    "large sinks": {"sinks": torch.full((4,), 50.0)},
    "one range": {"causal": False, "key_ranges": random_ranges(2, 1, 67, 130, seed=2)},
    "two ranges": {"causal": False, "key_ranges": random_ranges(2, 2, 67, 130, seed=3)},
    "two ranges, causal": {"key_ranges": random_ranges(2, 2, 67, 130, seed=4)},
    "overlapping ranges": {"causal": False, "key_ranges": int32(0, 60, 40, 130).view(1, 2, 1, 2).expand(2, 2, 67, 2)},
    "ranges past the keys": {"key_ranges": int32(-7, 20, 100, 999).view(1, 2, 1, 2).expand(2, 2, 67, 2)},
    "empty ranges": {"key_ranges": torch.zeros(2, 1, 67, 2, dtype=torch.int32)},
    "static cache": {"seqused_k": int32(130, 71)},
    "static cache shorter than q": {"seqused_k": int32(66, 1)},
    "empty static cache": {"seqused_k": int32(0, 0)},
    "static cache, window, sink tokens": {"seqused_k": int32(99, 71), "window_size_left": 8, "num_sink_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    check_attention("attention", qkv(dtype, batch=1, num_q_heads=2, num_kv_heads=1, head_dim=head_dim))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 64), (64, 1), (192, 128), (24, 40), (7, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dim_v(isa: str, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> None:
    check_attention("attention", qkv(dtype, batch=1, head_dim=head_dim, head_dim_v=head_dim_v))


@pytest.mark.sanitize(one_in=3)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_lengths(isa: str, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = qkv(dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=9, seed=seqlen_q)
        check_attention("attention", call, causal=causal)


@pytest.mark.sanitize(one_in=7)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(isa: str, dtype: torch.dtype, options: Call) -> None:
    check_attention("attention", qkv(dtype, seqlen_q=67, seqlen_k=130) | options)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1), (64, 1)])
def test_grouped_heads(num_q_heads: int, num_kv_heads: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = qkv(dtype, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
        out, _ = check_attention("attention", call)
        repeats = num_q_heads // num_kv_heads
        repeated = call | {name: call[name].repeat_interleave(repeats, dim=1) for name in ("k", "v")}
        torch.testing.assert_close(out, longctx.attention(**repeated)[0])


def random_call(seed: int) -> Call:
    """Any sizes, dtype, layout and combination of options."""
    rng = random.Random(seed)
    num_kv_heads, batch = rng.choice((1, 2, 3)), rng.choice((1, 2))
    seqlen_q, seqlen_k = rng.choice((4, 16, 33, 90)), rng.choice((1, 30, 97, 200, 540))
    call = qkv(
        rng.choice(DTYPES),
        batch=batch,
        num_q_heads=num_kv_heads * rng.choice((1, 2, 4)),
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=rng.choice((5, 16, 40, 64)),
        head_dim_v=rng.choice((16, 33, 48, 64)),
        seed=seed,
    )
    if rng.random() < 0.3:
        call |= {name: surround_with_nan(call[name], layout="bshd") for name in ("q", "k", "v")}
    optional: dict[str, Any] = {
        "causal": rng.random() < 0.5,
        "softmax_scale": rng.uniform(0.05, 1.0),
        "window_size_left": rng.choice((-1, 0, 3, 50, 400)),
        "window_size_right": rng.choice((-1, 0, 3, 50)),
        "num_sink_tokens": rng.choice((0, 1, 4, 70)),
        "softcap": rng.choice((0.0, 1.0, 20.0)),
        "sinks": randn(call["q"].shape[1], seed=seed + 3),
        "key_ranges": random_ranges(batch, rng.choice((1, 2)), seqlen_q, seqlen_k, seed=seed + 4),
    }
    if batch == 1 and rng.random() < 0.5:
        for axis, length in (("q", seqlen_q), ("k", seqlen_k)):
            inner = sorted(rng.randint(0, length) for _ in range(3))
            call[f"cu_seqlens_{axis}"] = int32(0, *inner, length)
    else:
        optional["seqused_k"] = int32(*(rng.randint(0, seqlen_k) for _ in range(batch)))
    return call | {name: value for name, value in optional.items() if rng.random() < 0.5}


@pytest.mark.parametrize("seed", range(150))
def test_random_combinations(seed: int) -> None:
    check_attention("attention", random_call(seed))


@pytest.mark.runs_on("cpu", reason="by instruction set: the same calls run without one")
@pytest.mark.parametrize("seed", range(0, 150, 5))
def test_random_combinations_by_isa(isa: str, seed: int) -> None:
    check_attention("attention", random_call(seed))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_one_by_one(isa: str, dtype: torch.dtype) -> None:
    call = qkv(dtype, batch=1, seqlen_q=150, seqlen_k=700)
    cu_seqlens_q, cu_seqlens_k = (0, 0, 40, 41, 41, 110, 150), (0, 7, 607, 620, 620, 650, 700)
    options = {"window_size_left": 50, "num_sink_tokens": 2}
    out, lse = check_attention(
        "attention",
        call | options | {"cu_seqlens_q": int32(*cu_seqlens_q), "cu_seqlens_k": int32(*cu_seqlens_k)},
    )
    for s in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[s], cu_seqlens_q[s + 1])
        keys = slice(cu_seqlens_k[s], cu_seqlens_k[s + 1])
        alone = longctx.attention(call["q"][:, :, rows], call["k"][:, :, keys], call["v"][:, :, keys], **options)
        assert_equal_to_rounding((out[:, :, rows], lse[:, :, rows]), alone)


@pytest.mark.sanitize
def test_rows_of_no_sequence_see_nothing() -> None:
    call = qkv(torch.float32, batch=1, seqlen_q=50, seqlen_k=60)
    call["k"][:, :, 40:], call["v"][:, :, 40:] = torch.nan, torch.nan
    out, lse = check_attention("attention", call | {"cu_seqlens_q": int32(0, 20, 30), "cu_seqlens_k": int32(0, 25, 40)})
    assert not out[:, :, 30:].any()
    assert torch.isneginf(lse[:, :, 30:]).all()


def test_no_sequence_at_all() -> None:
    out, lse = longctx.attention(**qkv(torch.float32, batch=1), cu_seqlens_q=int32(0), cu_seqlens_k=int32(0))
    assert not out.any()
    assert torch.isneginf(lse).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_behind_the_cache_does_not_leak(isa: str, dtype: torch.dtype) -> None:
    call = qkv(dtype, seqlen_k=600)
    for batch, used in enumerate((570, 41)):
        call["k"][batch, :, used:] = torch.nan
        call["v"][batch, :, used:] = torch.nan
    check_attention("attention", call | {"causal": False, "seqused_k": int32(570, 41)})


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_padding_keys_does_not_leak(isa: str, dtype: torch.dtype) -> None:
    """Left padding as `key_ranges` say it: the padding is in no row's range."""
    call = qkv(dtype, seqlen_q=75)
    for batch, padding in enumerate((13, 40)):
        call["k"][batch, :, :padding] = torch.nan
        call["v"][batch, :, :padding] = torch.nan
    key_ranges = torch.tensor([[13, 75], [40, 75]], dtype=torch.int32)[:, None, None].expand(2, 1, 75, 2)
    check_attention("attention", call | {"key_ranges": key_ranges})


def test_packed_neighbours_do_not_leak(isa: str) -> None:
    """One sequence of NaN leaves the others clean."""
    call = qkv(torch.bfloat16, batch=1, seqlen_q=60, seqlen_k=90)
    for name, rows in (("q", slice(20, 41)), ("k", slice(30, 55)), ("v", slice(30, 55))):
        call[name][:, :, rows] = torch.nan
    out, lse = longctx.attention(
        **call, causal=False, cu_seqlens_q=int32(0, 20, 41, 60), cu_seqlens_k=int32(0, 30, 55, 90)
    )
    clean = torch.ones(60, dtype=torch.bool)
    clean[20:41] = False
    assert torch.isfinite(out[:, :, clean]).all()
    assert torch.isfinite(lse[:, :, clean]).all()
    assert out[:, :, ~clean].isnan().all()


@pytest.mark.parametrize("scale", [30.0, -30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_logits_neither_overflow_nor_underflow(isa: str, dtype: torch.dtype, scale: float) -> None:
    """Far apart logits: the largest decides, wherever in the row it stands."""
    call = qkv(dtype, seqlen_k=1100)
    out, lse = longctx.attention(**call, softmax_scale=scale)
    exact, exact_lse = longctx.reference.attention(
        *(call[name].double() for name in ("q", "k", "v")), softmax_scale=scale
    )
    rounding = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * float(exact_lse.abs().max())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=rounding)
    tolerance = 4 * rounding + 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


def test_equal_logits_average_the_values(isa: str) -> None:
    call = qkv(torch.float32, seqlen_k=777)
    call["q"].zero_()
    out, lse = longctx.attention(**call, causal=False)
    mean = call["v"].mean(dim=2, keepdim=True).repeat_interleave(2, dim=1).expand_as(out)
    torch.testing.assert_close(out, mean)
    torch.testing.assert_close(lse, torch.full_like(lse, 777.0).log())


@pytest.mark.parametrize("options", [{}, {"window_size_left": 30, "num_sink_tokens": 3}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunked_prefill_equals_one_pass(isa: str, dtype: torch.dtype, options: Call) -> None:
    call = qkv(dtype, seqlen_q=150, seqlen_k=150)
    out, lse = longctx.attention(**call, **options)
    for begin, end in ((0, 1), (1, 50), (50, 150)):
        rows, keys = slice(begin, end), slice(0, end)
        part = longctx.attention(call["q"][:, :, rows], call["k"][:, :, keys], call["v"][:, :, keys], **options)
        assert_equal_to_rounding(part, (out[:, :, rows], lse[:, :, rows]))


def test_order_of_keys_does_not_matter(isa: str) -> None:
    call = qkv(torch.float32, seqlen_k=700)
    order = torch.randperm(700, generator=generator(0))
    permuted = call | {name: call[name][:, :, order] for name in ("k", "v")}
    assert_equal_to_rounding(longctx.attention(**permuted, causal=False), longctx.attention(**call, causal=False))


def test_lse_leaves_sinks_out() -> None:
    call = qkv(torch.float32)
    out, lse = longctx.attention(**call)
    sinks = randn(4, seed=5)
    out_with, lse_with = longctx.attention(**call, sinks=sinks)
    assert torch.equal(lse_with, lse)
    share = torch.sigmoid(lse - sinks[None, :, None])[..., None]  # exp(lse) / (exp(lse) + exp(sink))
    torch.testing.assert_close(out_with, out * share)
