"""Selection of the best scores of each row on a GPU; every contender is compared with a stable sort."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark.gpu_work import GpuCase, Inputs, Run, Work, gpu_case, randn

K = 1024
ROWS = "2048, 8 rows, {}"


def score_rows(length: int, device: str, rows: int, kind: str, dtype: torch.dtype) -> Tensor:
    scores = randn(rows, length, device=device, seed=0, dtype=torch.float32)
    if kind == "constant":
        scores = torch.ones_like(scores)
    elif kind == "16 values":
        scores = (4 * scores).round().clamp(-8, 7)
    elif kind == "ascending":
        scores = scores.sort(dim=-1).values
    elif kind == "between 1 and 1.1":
        scores = 1 + scores.sigmoid() / 10
    return scores.to(dtype)


def topk(
    length: int,
    device: str,
    *,
    rows: int = 8,
    kind: str = "random",
    kept: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """`kept` of each row, or a quarter of a shorter one."""
    k = min(kept, length // 4)
    inputs = {"scores": score_rows(length, device, rows, kind, dtype)}

    def check(name: str, output: Any) -> None:
        scores = inputs["scores"]
        exact = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
        if name == "longctx":
            if not torch.equal(output[0].long(), exact):
                raise ValueError("not the indices of a stable sort")
            return
        # Which of equal scores torch.topk takes is its own choice.
        found = scores.gather(-1, output[1]).float().sort(dim=-1).values
        torch.testing.assert_close(found, scores.gather(-1, exact).float().sort(dim=-1).values, rtol=0, atol=0)

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.topk_select(i["scores"], k),
        "torch.topk": lambda i: torch.topk(i["scores"], k),
    }
    return Work(inputs, contenders, 0.0, float(inputs["scores"].nbytes + 4 * rows * (k + 1)), check)


def share(length: int, device: str, *, rows: int = 8) -> Work:
    """The fewest logits, at most 4096, that hold half of the softmax of their row."""
    inputs = {"scores": 4 * score_rows(length, device, rows, "random", torch.float32)}

    def sorted_sums(i: Inputs) -> tuple[Tensor, Tensor]:
        weights, order = torch.softmax(i["scores"], dim=-1).sort(dim=-1, descending=True)
        return order, (weights.cumsum(-1) - weights < 0.5).sum(-1)

    def check(name: str, output: Any) -> None:
        counts = output[1].long()
        expected = sorted_sums(inputs)[1].clamp(max=4096)
        if int((counts - expected).abs().max()) > 1:  # sums of floats may cut elsewhere
            raise ValueError(f"counts of {counts.tolist()} instead of {expected.tolist()}")

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.threshold_select(i["scores"], value=0.5, method="cumulative", max_k=4096),
        "torch softmax, sort, cumsum": sorted_sums,
    }
    return Work(inputs, contenders, 0.0, float(inputs["scores"].nbytes), check)


def case(title: str, length: int, **options: Any) -> GpuCase:
    return gpu_case(title, "topk_select", length, topk, **({"dtype": torch.float32} | options))


HEADLINE = [case(ROWS.format("random"), 128 * K)]
OTHERS = [
    *(case(ROWS.format(kind), 128 * K, kind=kind) for kind in ("constant", "16 values", "between 1 and 1.1")),
    *(case(ROWS.format(kind), 1024 * K, kind=kind) for kind in ("random", "ascending")),
    case("2048, 8 rows, random bf16", 128 * K, dtype=torch.bfloat16),
    case("100000, 1 row, random", 1024 * K, rows=1, kept=100_000),
    case("2048, 256 rows, random", 128 * K, rows=256),
    case("128 of 8192 pages, 64 rows", 8 * K, rows=64, kept=128),
    gpu_case("half of the softmax, 8 rows", "threshold_select", 128 * K, share),
]
