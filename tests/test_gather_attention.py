"""`gather_attention` against its float64 twin, and against dense attention."""

from __future__ import annotations

import mmap
import random

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_equal_to_rounding, assert_same_bits, check_attention
from op_case import DTYPES, Call, generator, int32, randn
from topk_cases import gathered, gathered_all_options, gathered_paged, random_indices

HEAD_DIMS = (1, 7, 64, 80, 128, 192, 300)
# Around the sizes of a vector (16), a step (64 keys) and a list (512 keys).
NUM_ENTRIES = (0, 1, 15, 17, 63, 65, 513, 1100)
OPTIONS: dict[str, Call] = {
    "first": {"num_first": 4},
    "last": {"num_last": 9},
    "first and last": {"num_first": 4, "num_last": 9},
    "first and last meet": {"num_first": 100, "num_last": 100},
    "all of them": {"num_first": 10_000, "num_last": 10_000},
    "scale": {"softmax_scale": 0.7},
    "negative scale": {"softmax_scale": -0.2},
    "softcap": {"softcap": 2.5},
    "static cache": {"seqused_k": int32(130, 71), "num_last": 5},
    "static cache shorter than q": {"seqused_k": int32(2, 1), "num_first": 3},
    "empty static cache": {"seqused_k": int32(0, 0), "num_first": 3, "num_last": 3},
}


def every_key(call: Call, *, seed: int = 0) -> Tensor:
    """Indices that list every key, in random order."""
    shape = (call["q"].shape[0], 1, call["q"].shape[2], call["k"].shape[2])
    return torch.rand(shape, generator=generator(seed)).argsort(dim=-1).int()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    check_attention("gather_attention", gathered(dtype, head_dim=head_dim))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 64), (64, 1), (192, 128), (24, 40), (7, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dim_v(isa: str, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> None:
    check_attention("gather_attention", gathered(dtype, head_dim=head_dim, head_dim_v=head_dim_v))


@pytest.mark.sanitize(one_in=3)
@pytest.mark.parametrize("num_entries", NUM_ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_entries(isa: str, dtype: torch.dtype, num_entries: int) -> None:
    call = gathered(dtype, batch=1, seqlen_k=1200, num_entries=num_entries, seed=num_entries)
    check_attention("gather_attention", call)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 5), (2, 0), (1, 1), (3, 1), (7, 3), (40, 75)])
def test_lengths(isa: str, seqlen_q: int, seqlen_k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = gathered(dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        check_attention("gather_attention", call)
        check_attention("gather_attention", call, num_first=1, num_last=2)


@pytest.mark.parametrize("index_heads", ["one", "kv", "q"])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (6, 2), (5, 1), (14, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads(isa: str, dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, index_heads: str) -> None:
    heads = {"one": 1, "kv": num_kv_heads, "q": num_q_heads}[index_heads]
    check_attention(
        "gather_attention",
        gathered(dtype, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, index_heads=heads, seqlen_k=130),
    )


@pytest.mark.sanitize(one_in=5)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(isa: str, dtype: torch.dtype, options: Call) -> None:
    for block_size_k in (1, 16):
        check_attention("gather_attention", gathered(dtype, seqlen_k=130, block_size_k=block_size_k) | options)


@pytest.mark.sanitize
@pytest.mark.parametrize("block_size_k", [3, 64, 200, 700])
def test_block_sizes(isa: str, block_size_k: int) -> None:
    call = gathered(torch.bfloat16, seqlen_k=1300, num_entries=5, block_size_k=block_size_k)
    check_attention("gather_attention", call, num_last=7)


def random_call(seed: int) -> Call:
    rng = random.Random(seed)
    num_kv_heads, batch = rng.choice((1, 2, 3)), rng.choice((1, 2))
    group_size, seqlen_q = rng.choice((1, 2, 3, 4, 9)), rng.choice((1, 2, 5))
    index_heads = rng.choice((1, num_kv_heads, num_kv_heads * group_size))
    seqlen_k, num_entries = rng.choice((5, 97, 540, 1500)), rng.choice((3, 40, 600))
    call = gathered(
        rng.choice(DTYPES),
        batch=batch,
        num_q_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=rng.choice((16, 33, 64)),
        head_dim_v=rng.choice((8, 48)),
        index_heads=index_heads,
        num_entries=num_entries,
        block_size_k=rng.choice((1, 2, 16)),
        seed=seed,
    )
    if rng.random() < 0.5:
        shape = (batch, index_heads, seqlen_q)
        call["counts"] = torch.randint(0, num_entries + 1, shape, generator=generator(seed), dtype=torch.int32)
    if rng.random() < 0.5:
        call |= {"num_first": rng.choice((0, 4, 70)), "num_last": rng.choice((0, 4, 70))}
    if rng.random() < 0.5:
        call["seqused_k"] = torch.randint(0, seqlen_k + 1, (batch,), generator=generator(seed), dtype=torch.int32)
    return call


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(20))
def test_random_combinations(isa: str, seed: int) -> None:
    check_attention("gather_attention", random_call(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_every_key_equals_dense_attention(isa: str, dtype: torch.dtype, seqlen_q: int) -> None:
    call = gathered(dtype, seqlen_q=seqlen_q, seqlen_k=900, head_dim=64)
    dense = longctx.attention(call["q"], call["k"], call["v"])
    assert_equal_to_rounding(longctx.gather_attention(**call | {"indices": every_key(call)}), dense)
    nothing = torch.empty(2, 1, seqlen_q, 0, dtype=torch.int32)
    assert_equal_to_rounding(longctx.gather_attention(**call | {"indices": nothing}, num_first=900), dense)
    assert_equal_to_rounding(longctx.gather_attention(**call | {"indices": nothing}, num_last=900), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_indices_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    call = gathered(dtype, seqlen_k=3000, num_entries=1500, head_dim=64)
    expected = longctx.gather_attention(**call)
    for order in (torch.randperm(1500, generator=generator(1)), torch.arange(1500).flip(0)):
        permuted = call | {"indices": call["indices"][..., order]}
        assert_equal_to_rounding(longctx.gather_attention(**permuted), expected)


def test_forced_keys_count_once(isa: str) -> None:
    """Listing keys that are forced changes nothing, not even a bit."""
    call = gathered(torch.float32, seqlen_q=1, seqlen_k=300, num_entries=10)
    call["indices"] = int32(50, 1, 299, 0, 60, 298, 2, 290, 70, 3).view(1, 1, 1, 10).expand(2, 2, 1, 10)
    rest = call | {"indices": int32(50, -1, -1, -1, 60, -1, -1, -1, 70, -1).view(1, 1, 1, 10).expand(2, 2, 1, 10)}
    options = {"num_first": 4, "num_last": 10}
    check_attention("gather_attention", call, **options)
    assert_same_bits(longctx.gather_attention(**call, **options), longctx.gather_attention(**rest, **options))


def test_counts_of_zero_select_nothing(isa: str) -> None:
    call = gathered_all_options(torch.float32) | {"num_first": 0, "num_last": 0}
    call["counts"] = torch.zeros_like(call["counts"])
    call["counts"][1, 2, 1] = 9
    out, lse = check_attention("gather_attention", call)
    empty = torch.ones(2, 6, 3, dtype=torch.bool)
    empty[1, 4:6, 1] = False
    assert not out[empty].any()
    assert torch.isneginf(lse[empty]).all()
    assert lse[~empty].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(isa: str, dtype: torch.dtype) -> None:
    call = gathered(dtype, seqlen_q=5, seqlen_k=700, num_entries=300, head_dim=40)
    out, lse = longctx.gather_attention(**call)
    for row in range(5):
        last = 700 - 5 + row + 1
        alone = {
            "q": call["q"][:, :, row : row + 1],
            "k": call["k"][:, :, :last],
            "v": call["v"][:, :, :last],
            "indices": call["indices"][:, :, row : row + 1],
        }
        assert_equal_to_rounding(longctx.gather_attention(**alone), (out[:, :, [row]], lse[:, :, [row]]))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size_k", [1, 16])
def test_nan_in_unselected_rows_does_not_matter(isa: str, dtype: torch.dtype, block_size_k: int) -> None:
    """Of keys that no row selects, and of those that only other rows do."""
    call = gathered(dtype, seqlen_q=1, seqlen_k=600, num_entries=9, block_size_k=block_size_k, head_dim=32)
    listed = call["indices"][:, :, 0].long()
    selected = torch.zeros(2, 2, -(-600 // block_size_k), dtype=torch.bool)
    selected.scatter_(2, listed.clamp(min=0), listed >= 0)
    unselected = ~selected.repeat_interleave(block_size_k, dim=2)[:, :, :600]
    for name in ("k", "v"):
        call[name] = call[name].masked_fill(unselected[..., None], torch.nan)
    out, _ = check_attention("gather_attention", call)
    assert out.isfinite().all()


def test_one_row_of_nan_stays_there(isa: str) -> None:
    call = gathered(torch.bfloat16, seqlen_q=3, seqlen_k=200, num_entries=1, index_heads=1)
    call["indices"] = int32(5, 6, 7).view(1, 1, 3, 1).expand(2, 1, 3, 1)
    call["k"][:, :, 6], call["v"][:, :, 6] = torch.nan, torch.nan
    out, lse = longctx.gather_attention(**call)
    assert out[:, :, 1].isnan().all()
    assert out[:, :, [0, 2]].isfinite().all()
    assert lse[:, :, [0, 2]].isfinite().all()


def test_later_keys_are_never_seen(isa: str) -> None:
    call = gathered(torch.float32, seqlen_q=4, seqlen_k=80)
    call["indices"] = every_key(call)
    changed = call | {name: call[name].clone() for name in ("k", "v")}
    changed["k"][:, :, 78:], changed["v"][:, :, 78:] = torch.nan, torch.nan
    out, lse = longctx.gather_attention(**call)
    out_changed, lse_changed = longctx.gather_attention(**changed)
    assert_same_bits((out_changed[:, :, :2], lse_changed[:, :, :2]), (out[:, :, :2], lse[:, :, :2]))


@pytest.mark.parametrize("scale", [30.0, -30.0, 1e4])
def test_large_logits_neither_overflow_nor_underflow(isa: str, scale: float) -> None:
    """Far apart logits: the largest decides, in whichever segment it stands."""
    call = gathered(torch.float32, seqlen_k=1500, num_entries=1400)
    out, lse = longctx.gather_attention(**call, softmax_scale=scale)
    exact, exact_lse = longctx.reference.gather_attention(
        *(call[name].double() for name in ("q", "k", "v")), call["indices"], softmax_scale=scale
    )
    rounding = 64 * torch.finfo(torch.float32).eps * float(exact_lse.abs().max())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=rounding)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * rounding * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_give_the_same_bits_on_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    call = gathered(dtype, batch=1, seqlen_q=1, seqlen_k=5000, num_entries=3000, head_dim=32)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(longctx.gather_attention(**call))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_broadcast_and_strided_indices(isa: str) -> None:
    call = gathered(torch.float32, seqlen_q=3, seqlen_k=200, num_entries=30, index_heads=1)
    one = call["indices"][:1, :, :1]
    wide = torch.full((2, 2, 3, 64), 10_000, dtype=torch.int32)
    wide[..., 5:35] = one
    views = (one.expand(2, 2, 3, 30), wide[..., 5:35])
    expected = longctx.gather_attention(**call | {"indices": one.expand(2, 2, 3, 30).contiguous()})
    assert_same_bits(longctx.gather_attention(**call | {"indices": views[1]}), expected)
    # One row for all tokens is one pass over their keys: other segments.
    for shared in (views[0], one.expand(2, 2, 1, 30)):
        assert_equal_to_rounding(longctx.gather_attention(**call | {"indices": shared}), expected)
    counts = torch.full((3, 2, 2), 20, dtype=torch.int32).permute(1, 2, 0)
    shorter = call | {"indices": views[1], "counts": counts}
    assert_same_bits(
        longctx.gather_attention(**shorter), longctx.gather_attention(**call | {"indices": views[1][..., :20]})
    )


@pytest.mark.parametrize("dim", range(3))
def test_addresses_beyond_32_bits(dim: int) -> None:
    """Batch entries, heads or rows farther apart than 2^31 elements; pages that nobody touches cost no memory."""
    call = gathered(torch.bfloat16, seqlen_q=1, seqlen_k=2, num_entries=2)
    views = {}
    for name in ("k", "v"):
        strides = list(call[name].stride())
        strides[dim] = 2**31 + 64
        storage = mmap.mmap(
            -1, 2 * (2 * strides[dim] + call[name].numel()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        )
        buffer = torch.frombuffer(storage, dtype=torch.bfloat16)
        views[name] = buffer.as_strided(call[name].shape, strides).copy_(call[name])
    assert_same_bits(longctx.gather_attention(**call | views), longctx.gather_attention(**call))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(isa: str, dtype: torch.dtype) -> None:
    check_attention("gather_attention", gathered_paged(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("block_size_k", [1, 4, 16, 24])
@pytest.mark.parametrize("page_size", [1, 16, 600])
def test_pages_equal_contiguous_keys(isa: str, page_size: int, block_size_k: int) -> None:
    """The same bits, wherever the pages lie; other pages may hold anything."""
    call = gathered(torch.bfloat16, seqlen_k=1100, num_entries=60, block_size_k=block_size_k, head_dim=32)
    call |= {"seqused_k": int32(1100, 900), "num_first": 5, "num_last": 20}
    expected = longctx.gather_attention(**call)
    max_pages = -(-1100 // page_size)
    table = torch.randperm(2 * max_pages + 3, generator=generator(0))[: 2 * max_pages].view(2, max_pages).int()
    paged = call | {"page_table": table}
    for name in ("k", "v"):
        cache = torch.full((2 * max_pages + 3, 2, page_size, 32), torch.nan, dtype=torch.bfloat16)
        for b, used in enumerate((1100, 900)):
            for page in range(-(-used // page_size)):
                rows = call[name][b, :, page * page_size : min((page + 1) * page_size, used)]
                cache[int(table[b, page]), :, : rows.shape[1]] = rows
        paged[name] = cache
    assert_same_bits(longctx.gather_attention(**paged), expected)
    rows_first = paged | {name: paged[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k", "v")}
    assert_same_bits(longctx.gather_attention(**rows_first), expected)


def test_keys_of_missing_pages_are_skipped(isa: str) -> None:
    call = gathered_paged(torch.float32)
    call["page_table"] = call["page_table"].clone()
    call["page_table"][0, 1], call["page_table"][0, 3] = -1, 15
    missing = (call["indices"][0] // 16 == 1) | (call["indices"][0] // 16 == 3)
    listed = call | {"indices": call["indices"].clone()}
    listed["indices"][0] = listed["indices"][0].masked_fill(missing, -1)
    assert_equal_to_rounding(longctx.gather_attention(**call), longctx.gather_attention(**listed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"num_first": 3, "num_last": 30}], ids=str)
@pytest.mark.parametrize(("num_q_heads", "index_heads"), [(2, 2), (8, 1), (8, 8)])
def test_bias(isa: str, dtype: torch.dtype, options: Call, num_q_heads: int, index_heads: int) -> None:
    sizes = {"num_q_heads": num_q_heads, "index_heads": index_heads, "seqlen_k": 200, "num_entries": 70}
    call = gathered(dtype, block_size_k=2, **sizes)
    call["bias"] = 2.0 * randn(*call["indices"].shape, seed=3)
    call["bias"][..., ::5] = -torch.inf
    check_attention("gather_attention", call, **options)


def test_bias_counts_copies_of_a_key(isa: str) -> None:
    """A bias of log n is as good as n equal keys: how one centroid stands for its cluster."""
    call = gathered(torch.float32, seqlen_q=1, seqlen_k=6, num_entries=6, index_heads=1)
    call["indices"] = int32(0, 1, 2, 3, 4, 5).view(1, 1, 1, 6).expand(2, 1, 1, 6)
    for name in ("k", "v"):
        call[name][:, :, 3:] = call[name][:, :, 2:3]
    once = call | {"indices": call["indices"][..., :3], "bias": torch.tensor([1.0, 1.0, 4.0]).log().expand(2, 1, 1, 3)}
    assert_equal_to_rounding(longctx.gather_attention(**once), longctx.gather_attention(**call))


def test_random_indices_are_what_they_should() -> None:
    indices = random_indices(2, 3, 4, 20, num_blocks=15, seed=0)
    assert indices.max() == 14
    assert (indices[..., 15:] == -1).all()
    for row in indices.flatten(0, 2).tolist():
        chosen = [entry for entry in row if entry >= 0]
        assert len(chosen) == len(set(chosen)) > 5
