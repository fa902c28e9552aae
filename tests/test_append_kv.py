"""`append_kv` against its twin and against copies followed by `update_pages`, to the bit."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES
from checks import assert_same_bits, record
from kv_cases import APPENDED, NAMES, appended, appended_all_options, appended_paged, caches
from op_case import DTYPES, Call, generator, int32, randn

CASE = CASES["append_kv"]


def check(call: Call) -> tuple[Tensor, ...]:
    """The twin's bits; means, which it computes in float64, those of `update_pages`."""
    result, twin = CASE.op(**call), CASE.twin(**call)
    assert_same_bits(result[:3], twin[:3])
    for summary in result[3:]:
        expected = call["summary"].clone()
        lengths, k_cache, _ = twin[:3]
        options = {"method": call.get("summary_method", "minmax"), "page_table": call.get("page_table")}
        longctx.update_pages(expected, k_cache, call["start"], call["summary_page_size"], seqused_k=lengths, **options)
        assert_same_bits(summary, expected)
        torch.testing.assert_close(summary, twin[3])
    record("append_kv", call["k"].dtype)
    return result


@pytest.mark.sanitize
def test_equal_to_the_twin(isa: str) -> None:
    for make in APPENDED.values():
        for dtype in DTYPES:
            check(make(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(12))
def test_random_places(seed: int) -> None:
    """Anywhere in the cache, over its ends and on pages that are missing, summaries of pages of any size."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, dtype=torch.int32)

    num_new, size, method = (0, 1, 7, 80)[seed % 4], (1, 16, 130, 2**20)[seed // 3], ("minmax", "mean")[seed % 2]
    extremes = (2,) if method == "minmax" else ()
    for make, room in ((appended, 75), (appended_paged, 112)):
        call = make((torch.float32, torch.bfloat16)[seed % 2])
        call |= {"k": randn(2, 3, num_new, 16, dtype=call["k"].dtype, seed=seed)}
        call |= {"v": randn(2, 3, num_new, 24, dtype=call["k"].dtype, seed=seed + 1)}
        call |= {"start": draw(2, low=-10, high=room + 10), "counts": draw(2, low=-1, high=num_new + 3)}
        call |= {"summary": randn(2, 3, -(-room // size), *extremes, 16, dtype=call["k"].dtype, seed=seed + 2)}
        call |= {"summary_page_size": size, "summary_method": method}
        if "page_table" in call:
            call["page_table"][0, ::2] = draw(4, low=-3, high=0)
        check(call)


@pytest.mark.sanitize
@pytest.mark.parametrize("method", ["minmax", "mean"])
def test_tokens_one_by_one(isa: str, method: str) -> None:
    """Written token by token and in chunks, a cache and its summary end as if written at once."""
    for dtype in DTYPES:
        k_cache, v_cache = caches(dtype).values()
        k, v = caches(dtype, seed=5).values()
        summary = longctx.summarize_pages(k_cache, 16, method=method, seqused_k=int32(0, 0))  # type: ignore[arg-type]
        used: int | Tensor = 0
        for end in (1, 2, 16, 17, 50, 51, 75):
            begin = used if isinstance(used, int) else int(used[0])
            new = (x[:, :, begin:end] for x in (k, v))
            used = longctx.append_kv(
                k_cache,
                v_cache,
                *new,
                used,
                summary=summary,
                summary_page_size=16,
                summary_method=method,  # type: ignore[arg-type]
            )
            assert used.tolist() == [end, end]
        assert_same_bits((k_cache, v_cache), (k, v))
        assert_same_bits(summary, longctx.summarize_pages(k, 16, method=method))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_more_rows_than_a_thread_takes(num_threads: int) -> None:
    """Rows in the order [batch, seqlen, heads, dim], as projections give them, over many work items."""
    k, v = (randn(2, 1500, 3, dim, dtype=torch.bfloat16, seed=dim).transpose(1, 2) for dim in (64, 24))
    k_cache, v_cache = (x.new_zeros(2, 3, 2000, x.shape[3]) for x in (k, v))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    lengths = longctx.append_kv(k_cache, v_cache, k, v, int32(100, 700), counts=int32(1500, 1100))
    torch.set_num_threads(before)
    assert lengths.tolist() == [1600, 1800]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[0, :, 100:1600], rows[0])
        assert torch.equal(cache[1, :, 700:1800], rows[1, :, :1100])
        assert not cache[0, :, :100].any()
        assert not cache[1, :, 1800:].any()


@pytest.mark.sanitize
def test_payload_of_nan_and_neighbours_stay(isa: str) -> None:
    """Rows are copied bit by bit, into views of larger buffers, of which nothing else changes."""
    for dtype, integers in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        call = appended(dtype)
        for name in ("k", "v"):
            bits = torch.randint(-(2**15), 2**15, call[name].shape, generator=generator(7)).to(integers)
            call[name] = (bits if dtype != torch.float32 else bits * 2**16 + 1).view(dtype)
        buffers = {name: torch.full((2, 80, 3, call[name].shape[3] + 5), 7, dtype=dtype) for name in NAMES}
        views = {name: buffer[:, 2:77, :, 1:-4].transpose(1, 2) for name, buffer in buffers.items()}
        longctx.append_kv(**call | views)
        for name, view in views.items():
            rows = call[name[0]]
            written = view[:, :, 40:45]
            assert torch.equal(written.contiguous().view(integers), rows.view(integers))
            written.fill_(7)
            assert (buffers[name] == 7).all()


def test_full_cache_is_an_error_or_clamped() -> None:
    call = appended_all_options(torch.float32)
    with pytest.raises(ValueError, match="longctx::append_kv: `start` must leave room for the new tokens"):
        longctx.append_kv(**appended(torch.float32) | {"start": 71})
    with pytest.raises(ValueError, match="longctx::append_kv: `start` must be in"):
        longctx.append_kv(**call | {"start": int32(3, 63)}, validate=True)
    lengths, k_cache, *_ = check(call | {"start": int32(60, 75), "counts": int32(20, 1)})
    assert lengths.tolist() == [75, 75]
    assert torch.equal(k_cache[0, :, 60:], call["k"][0, :, :15])
    assert torch.equal(k_cache[1], call["k_cache"][1])


def test_a_summary_needs_its_page_size() -> None:
    call = appended_all_options(torch.float32)
    with pytest.raises(ValueError, match="`summary_page_size` must be given with `summary` only"):
        longctx.append_kv(**call | {"summary": None})
    with pytest.raises(ValueError, match=r"`summary_page_size` must be in \[1, 2\^20\] with `summary`"):
        longctx.append_kv(**call | {"summary_page_size": 0})
    with pytest.raises(ValueError, match="`summary_method` must be 'minmax' or 'mean'"):
        longctx.append_kv(**call | {"summary_method": "pooled"})
    with pytest.raises(ValueError, match="`k` must not lie in the storage of a cache"):
        longctx.append_kv(**call | {"k": call["k_cache"][:, :, :20]}, validate=True)


@pytest.mark.parametrize("argument", ["k_cache", "v_cache", "k", "v", "summary"])
def test_gradients_are_refused(argument: str) -> None:
    call = appended_all_options(torch.float32)
    call[argument].requires_grad_()
    with pytest.raises(NotImplementedError, match="longctx::append_kv has no backward"):
        longctx.append_kv(**call)
    with torch.no_grad():
        longctx.append_kv(**call)


@pytest.mark.runs_on("cpu", "simt", reason="addresses beyond 32 bits: of GPU memory in test_cuda.py")
@pytest.mark.parametrize("dim", range(3))
def test_addresses_beyond_32_bits(dim: int) -> None:
    """Batch entries, heads or rows farther apart than 2^31 elements; pages that nobody touches cost no memory."""
    call = appended(torch.bfloat16)
    call |= {"k_cache": call["k_cache"][:, :2, :2], "v_cache": call["v_cache"][:, :2, :2], "start": 1}
    call |= {name: call[name][:, :2, :1] for name in ("k", "v")}
    views = {}
    for name in NAMES:
        strides = list(call[name].contiguous().stride())
        strides[dim] = 2**31 + 64
        storage = mmap.mmap(-1, 2 * (2 * strides[dim] + 4096), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        views[name] = torch.frombuffer(storage, dtype=torch.bfloat16).as_strided(call[name].shape, strides)
        views[name].copy_(call[name])
    longctx.append_kv(**call | views)
    for name in NAMES:
        assert_same_bits(views[name], torch.cat([call[name][:, :, :1], call[name[0]]], dim=2))
