"""What happens to rows of caches, on a GPU: copied out, and moved in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark import gpu_gather
from longctx.benchmark.gpu_work import GpuCase, Inputs, Run, Work, gpu_case, randn

K = 1024
HEADS, DIM = 8, 128
ROW_BYTES = 2 * DIM


def copied(length: int, device: str, *, batch: int = 16) -> Work:
    """A 32nd of the keys of each head, anywhere among `length`."""
    order = randn(batch, HEADS, length, device=device, seed=2, dtype=torch.float32).argsort(dim=-1)
    inputs: Inputs = {
        "k": randn(batch, HEADS, length, DIM, device=device, seed=0),
        "v": randn(batch, HEADS, length, DIM, device=device, seed=1),
        "indices": order[..., : length // 32].sort(dim=-1).values.int(),
    }

    def gathered(i: Inputs) -> tuple[Tensor, Tensor]:
        return gpu_gather.rows(i | {"indices": i["indices"][:, :, None], "block_size_k": 1})

    def check(name: str, output: Any) -> None:
        torch.testing.assert_close(tuple(output), gathered(inputs), rtol=0, atol=0)

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.gather_kv(i["k"], i["v"], i["indices"]),
        "torch.gather": gathered,
    }
    rows = 2.0 * batch * HEADS * (length // 32)
    return Work(inputs, contenders, 0.0, 2 * rows * ROW_BYTES + inputs["indices"].nbytes, check)


def layers_of(caches: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    k, v = caches.unflatten(0, (2, -1)).unbind()
    return list(k), list(v)


def compacted(length: int, device: str, *, layers: int = 8) -> Work:
    """Of every layer 4 sinks and every other of the remaining keys stay. What ours has moved it moves again."""
    kept = torch.cat([torch.arange(4), torch.arange(4, length, 2)]).to(device)
    caches = randn(2 * layers, 1, HEADS, length, DIM, device=device, seed=0)
    inputs: Inputs = {"ours": caches, "theirs": caches.clone(), "indices": kept.int().view(1, 1, -1), "kept": kept}

    def compact(i: Inputs) -> Tensor:
        caches: Tensor = i["ours"]
        longctx.compact_kv(*layers_of(caches), i["indices"])
        return caches[..., : len(kept), :]

    def index_select(i: Inputs) -> list[Tensor]:
        """Into new tensors, as a cache without rows of its own does."""
        return [cache.index_select(2, i["kept"]) for cache in i["theirs"]]

    def check(name: str, output: Any) -> None:
        torch.testing.assert_close(list(output), index_select(inputs), rtol=0, atol=0)

    moved = 2.0 * layers * HEADS * (len(kept) - 5) * ROW_BYTES  # the first five stay where they are
    contenders: dict[str, Run] = {"longctx": compact, "index_select": index_select}
    return Work(inputs, contenders, 0.0, 2 * moved, check)


def truncated(length: int, device: str, *, layers: int = 32) -> Work:
    """The end of a round of speculative decoding: a path of 6 among the 64 tokens of a tree, in all layers."""
    path = torch.tensor([0, 2, 9, 23, 40, 61], device=device)
    caches = randn(2 * layers, 1, HEADS, length, DIM, device=device, seed=0)
    used = torch.full((1,), length, dtype=torch.int32, device=device)
    inputs: Inputs = {
        "ours": caches,
        "theirs": caches.clone(),
        "path": path,
        "accepted": path.int()[None],
        "used": used,
    }
    first = length - 64
    exact = caches[..., first + path, :]

    def truncate(i: Inputs) -> Tensor:
        caches: Tensor = i["ours"]
        longctx.truncate_kv(*layers_of(caches), i["used"], 64, accepted=i["accepted"])
        return caches[..., first : first + len(path), :]

    def torch_rows(i: Inputs) -> Tensor:
        """All layers lie in one tensor here, so one call moves them."""
        caches: Tensor = i["theirs"]
        caches[..., first : first + len(path), :] = caches[..., first + i["path"], :]
        return caches[..., first : first + len(path), :]

    def check(name: str, output: Any) -> None:
        torch.testing.assert_close(output, exact, rtol=0, atol=0)

    contenders: dict[str, Run] = {"longctx": truncate, "torch, one tensor": torch_rows}
    moved = 2.0 * layers * HEADS * (len(path) - 1) * ROW_BYTES  # the root stays
    return Work(inputs, contenders, 0.0, 2 * moved, check)


CASES: list[GpuCase] = [
    gpu_case("4096 scattered keys of each, batch 16, 8 heads", "gather_kv", 128 * K, copied),
    gpu_case("half of the keys, 8 layers of 8 heads", "compact_kv", 32 * K, compacted),
    gpu_case("a path of 6 among 64 tokens, 32 layers of 8 heads", "truncate_kv", 2 * K, truncated),
]
