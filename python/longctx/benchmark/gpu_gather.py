"""`gather_attention` on a GPU, of more selected keys than its L2 cache holds: tokens, and pages of 16 keys."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark.gpu_work import GpuCase, Inputs, Run, Work, gpu_case, randn

K = 1024
TOKENS = "4096 scattered keys of each, batch 16, heads 32/8"
PAGES = "256 scattered pages of 16 keys of each, batch 16, heads 32/8"
HEADS, KV_HEADS, DIM = 32, 8, 128


def rows(i: Inputs, entries: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Copies of the selected keys and values of some batch entries."""
    size = i["block_size_k"]
    keys = (size * i["indices"][entries, :, 0].long())[..., None] + torch.arange(size, device=i["k"].device)
    index = keys.flatten(2)[..., None].expand(-1, -1, -1, DIM)
    return i["k"][entries].gather(2, index), i["v"][entries].gather(2, index)


def copied(i: Inputs) -> Tensor:
    k, v = rows(i)
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(i["q"], k, v, enable_gqa=True)
    return out


def gather(length: int, device: str, *, block_size_k: int, batch: int = 16) -> Work:
    """One query token, which selects a 32nd of `length` keys."""
    inputs: Inputs = {
        "q": randn(batch, HEADS, 1, DIM, device=device, seed=0),
        "k": randn(batch, KV_HEADS, length, DIM, device=device, seed=1),
        "v": randn(batch, KV_HEADS, length, DIM, device=device, seed=2),
        "block_size_k": block_size_k,
        "workspace": torch.zeros(batch * HEADS, dtype=torch.int32, device=device),
    }
    blocks, num_entries = length // block_size_k, length // 32 // block_size_k
    order = randn(batch, KV_HEADS, 1, blocks, device=device, seed=3, dtype=torch.float32).argsort(dim=-1)
    inputs["indices"] = order[..., :num_entries].sort(dim=-1).values.int()

    @functools.cache
    def expected() -> Tensor:
        k, v = (x.float().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in rows(inputs, slice(1)))
        return torch.softmax(DIM**-0.5 * inputs["q"][:1].float() @ k.mT, dim=-1) @ v

    def check(name: str, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(out[:1].float(), expected(), atol=2e-2, rtol=2e-2)

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.gather_attention(
            i["q"], i["k"], i["v"], i["indices"], block_size_k=i["block_size_k"]
        ),
        "longctx, one launch": lambda i: longctx.gather_attention(
            i["q"], i["k"], i["v"], i["indices"], block_size_k=i["block_size_k"], workspace=i["workspace"]
        ),
        "torch.gather + sdpa": copied,
    }
    keys = batch * KV_HEADS * num_entries * block_size_k
    gathered = float(keys * 2 * DIM * inputs["k"].element_size())
    flops = 4.0 * DIM * keys * HEADS / KV_HEADS
    return Work(inputs, contenders, flops, gathered + inputs["indices"].nbytes + 2.0 * inputs["q"].nbytes, check)


def case(title: str, block_size_k: int) -> GpuCase:
    return gpu_case(title, "gather_attention", 128 * K, gather, block_size_k=block_size_k)


CASES = [case(PAGES, 16), case(TOKENS, 1)]
