"""`gather_attention` with a rotary embedding at positions that the call chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_equal_to_rounding, check_attention
from op_case import DTYPES, INT32_MAX, Call, generator, int32
from topk_cases import gathered, gathered_roped, rope_table

OPTIONS: dict[str, Call] = {
    "indices": {},
    "indices, forced keys": {"num_first": 7, "num_last": 20},
    "entries": {"k_positions": int32(*range(20)).expand(2, 2, 3, 20)},
    "one position an entry": {"k_position_step": 0, "q_positions": int32((30, 30, 30), (99, 98, 97)), "num_last": 9},
    "out of the table": {"q_positions": int32((12, 75, 100), (-1, 4, 5)), "num_last": 9, "num_first": 2},
    "paged": {"seqused_k": int32(75, 70), "page_table": torch.randperm(10, generator=generator(5)).view(2, 5).int()},
}


def expand(entries: Tensor, *, seqlen_q: int = 1) -> Tensor:
    """[2, 1, seqlen_q, num_entries]: the same for every batch entry and token."""
    return entries.expand(2, 1, seqlen_q, len(entries))


def roped(rows: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Llama's rotary embedding of `rows [batch, heads, seqlen, head_dim]`, as transformers computes it."""
    cos, sin = (torch.cat([part, part], dim=-1) for part in table[positions.long()].unbind(1))
    half = rows.shape[-1] // 2
    return rows * cos + torch.cat([-rows[..., half:], rows[..., :half]], dim=-1) * sin


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
def test_dtypes(isa: str, dtype: torch.dtype) -> None:
    check_attention("gather_attention", gathered_roped(dtype))


@pytest.mark.runs_on("cpu", reason="float64: on CUDA an error (test_cuda.py)")
def test_float64(isa: str) -> None:
    call = gathered_roped(torch.float64)
    twin = longctx.reference.gather_attention(**call)
    for actual, expected in zip(longctx.gather_attention(**call), twin, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rotary_dim", [2, 18, 64, 66])
@pytest.mark.parametrize("head_dim", [66, 128])
def test_rotary_dims(isa: str, head_dim: int, rotary_dim: int) -> None:
    call = gathered(torch.float32, head_dim=head_dim, num_entries=70)
    check_attention("gather_attention", call, rope_cos_sin=rope_table(75, rotary_dim))


@pytest.mark.parametrize("block_size_k", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_positions(isa: str, options: Call, block_size_k: int) -> None:
    call = gathered(torch.bfloat16, block_size_k=block_size_k, num_q_heads=6) | options
    if "page_table" in options:
        pages = gathered(torch.bfloat16, batch=10, seqlen_k=16, seed=3)
        call |= {"k": pages["k"], "v": pages["v"]}
    check_attention("gather_attention", call, rope_cos_sin=rope_table(100, 16))


def test_compacted_cache(isa: str) -> None:
    """StreamingLLM and SirLLM: what is left of the cache stands at its slots."""
    call = gathered(torch.float32, seqlen_q=2, seqlen_k=90, head_dim=32, num_entries=0)
    table, slots = rope_table(90, 32), torch.arange(90)
    out = longctx.gather_attention(**call, rope_cos_sin=table, num_first=4, num_last=90)
    dense = longctx.attention(roped(call["q"], slots[88:], table), roped(call["k"], slots, table), call["v"])
    assert_equal_to_rounding(out, dense)


def test_constant_distance(isa: str) -> None:
    """InfLLM and LM-Infinite: far keys at position 0, near ones where they are, seen from the limit."""
    call = gathered(torch.float32, seqlen_q=2, seqlen_k=90, head_dim=32, block_size_k=8)
    limit, near = 20, 12
    call["indices"] = expand(int32(0, 5, 7), seqlen_q=2)
    table = rope_table(limit + 1, 32)
    options = {"k_positions": torch.zeros_like(call["indices"]), "k_position_step": 0, "num_last": near}
    at_limit = torch.full((2, 2), limit, dtype=torch.int32)
    out = longctx.gather_attention(**call, **options, rope_cos_sin=table, q_positions=at_limit)
    q = roped(call["q"], at_limit[0], table)
    for i in range(2):
        last = torch.arange(89 + i - near, 89 + i)
        keys = torch.cat([torch.arange(8), torch.arange(40, 48), torch.arange(56, 64), last])
        at = torch.cat([torch.zeros(24), torch.arange(limit + 1 - near, limit + 1)])
        k, v = (call[name][:, :, keys] for name in ("k", "v"))
        dense = longctx.attention(q[:, :, [i]], roped(k, at, table), v)
        assert_equal_to_rounding((out[0][:, :, [i]], out[1][:, :, [i]]), dense)


def test_compact_positions(isa: str) -> None:
    """LongHeads and Landmark Attention: chosen chunks follow each other, then the token's own."""
    call = gathered(torch.float32, seqlen_q=1, seqlen_k=90, head_dim=32, block_size_k=8)
    chunks, at = expand(int32(0, 4, 9, 11)), expand(int32(0, 8, 16, 24))  # the last one: keys 88 and 89
    options = {"rope_cos_sin": rope_table(26, 32), "q_positions": int32((25,), (25,))}
    out = longctx.gather_attention(**call | {"indices": chunks}, k_positions=at, **options)
    keys = torch.cat([torch.arange(8 * chunk, min(8 * chunk + 8, 90)) for chunk in (0, 4, 9, 11)])
    k, v = (call[name][:, :, keys] for name in ("k", "v"))
    table = options["rope_cos_sin"]
    dense = longctx.attention(roped(call["q"], int32(25), table), roped(k, torch.arange(26), table), v)
    assert_equal_to_rounding(out, dense)
    forced = call | {"indices": chunks[..., :3], "k_positions": at[..., :3], "num_last": 2}
    assert_equal_to_rounding(longctx.gather_attention(**forced, **options), dense)


@pytest.mark.sanitize
def test_positions_out_of_the_table_are_skipped(isa: str) -> None:
    call = gathered(torch.float32, seqlen_q=1, seqlen_k=90, head_dim=32)
    options = {"rope_cos_sin": rope_table(50, 32), "q_positions": int32((49,), (49,))}
    blocks = {"indices": expand(int32(3, 9, 20, 30)), "k_positions": expand(int32(-1, 4, 49, INT32_MAX))}
    out = longctx.gather_attention(**call | blocks, **options, block_size_k=2)
    inside = {"indices": expand(int32(7, 18, 19, 40)), "k_positions": expand(int32(0, 4, 5, 49))}
    assert_equal_to_rounding(out, longctx.gather_attention(**call | inside, **options))
    nowhere = options | {"q_positions": int32((50,), (-1,))}
    out, lse = longctx.gather_attention(**call, **nowhere, num_last=9)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_positions_need_a_table() -> None:
    call = gathered_roped(torch.float32) | {"rope_cos_sin": None}
    with pytest.raises(ValueError, match="`rope_cos_sin` must be given with positions; got None"):
        longctx.gather_attention(**call)
