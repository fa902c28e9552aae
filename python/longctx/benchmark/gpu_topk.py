"""Which keys a decode step reads, on a GPU: summaries, clusters and scores of keys and pages, the best of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark import gpu_gather, peers
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


def best(scores: Tensor, k: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values


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
        exact = best(scores, k)
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


# ---- 32 query heads of one token, 8 kv heads, D=128 ----

PAGE = 16
GROUP = 4


def keys(length: int, device: str) -> Inputs:
    return {
        "q": randn(1, 8 * GROUP, 1, 128, device=device, seed=0),
        "k": randn(1, 8, length, 128, device=device, seed=1),
    }


def close(expected: Tensor) -> Any:
    def check(name: str, output: Tensor) -> None:
        torch.testing.assert_close(output.float(), expected.float(), atol=5e-2, rtol=2e-2)

    return check


def extremes(inputs: Inputs) -> Tensor:
    pages = inputs["k"].unflatten(2, (-1, PAGE))
    return torch.stack([pages.amin(dim=3), pages.amax(dim=3)], dim=3)


def summaries(length: int, device: str) -> Work:
    inputs = keys(length, device)
    contenders: dict[str, Run] = {"longctx": lambda i: longctx.summarize_pages(i["k"], PAGE), "torch": extremes}
    return Work(inputs, contenders, 0.0, inputs["k"].nbytes * (1 + 2 / PAGE), close(extremes(inputs)))


def updates(length: int, device: str) -> Work:
    """One new key: what a decode step adds to a summary."""
    inputs = keys(length, device)
    inputs["summary"] = extremes(inputs)

    def update(i: Inputs) -> Tensor:
        summary: Tensor = i["summary"]
        longctx.update_pages(summary, i["k"], length - 1, PAGE)
        return summary

    def last_page(i: Inputs) -> Tensor:
        summary: Tensor = i["summary"]
        summary[:, :, -1:] = extremes({"k": i["k"][:, :, -PAGE:]})
        return summary

    contenders: dict[str, Run] = {"longctx": update, "torch": last_page}
    return Work(inputs, contenders, 0.0, 8.0 * 128 * 2 * (PAGE + 2), close(extremes(inputs)))


def appended(length: int, device: str) -> Work:
    """A new token: its key and value behind the others, and its page of the summary."""
    inputs = keys(length, device)
    inputs |= {"v": randn(1, 8, length, 128, device=device, seed=2), "summary": extremes(inputs)}
    inputs |= {f"new_{name}": inputs[name][:, :, -1:].clone() for name in ("k", "v")}
    inputs["place"] = torch.full((1,), length - 1, device=device)
    inputs["used"] = inputs["place"].int()

    def append(i: Inputs) -> Tensor:
        summary: Tensor = i["summary"]
        longctx.append_kv(i["k"], i["v"], i["new_k"], i["new_v"], i["used"], summary=summary, summary_page_size=PAGE)
        return summary

    def index_copy(i: Inputs) -> Tensor:
        summary: Tensor = i["summary"]
        for name in ("k", "v"):
            i[name].index_copy_(2, i["place"], i[f"new_{name}"])
        summary[:, :, -1:] = extremes({"k": i["k"][:, :, -PAGE:]})
        return summary

    contenders: dict[str, Run] = {"longctx": append, "index_copy_, amin, amax": index_copy}
    return Work(inputs, contenders, 0.0, 8.0 * 128 * 2 * (PAGE + 6), close(extremes(inputs)))


def page_bounds(length: int, device: str) -> Work:
    inputs = keys(length, device)
    inputs["summary"] = extremes(inputs)

    def formula(i: Inputs) -> Tensor:
        x = (128**-0.5 * i["q"].float()).unflatten(1, (8, GROUP))  # [1, 8, GROUP, 1, 128]
        low, high = i["summary"].float().unbind(dim=3)
        each: Tensor = x.clamp(max=0) @ low[:, :, None].mT + x.clamp(min=0) @ high[:, :, None].mT
        return each.amax(dim=2)

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.page_scores(i["q"], i["summary"], head_reduce="group_max"),
        "torch": formula,
    }
    flops = 4.0 * 8 * GROUP * 128 * length / PAGE
    return Work(inputs, contenders, flops, float(inputs["summary"].nbytes), close(formula(inputs)))


def key_products(length: int, device: str) -> Work:
    inputs = keys(length, device)

    def formula(i: Inputs) -> Tensor:
        each: Tensor = 128**-0.5 * i["q"].unflatten(1, (8, GROUP)) @ i["k"][:, :, None].mT
        return each.amax(dim=2)

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.token_scores(i["q"], i["k"], head_reduce="group_max"),
        "torch": formula,
    }
    return Work(inputs, contenders, 2.0 * 8 * GROUP * 128 * length, float(inputs["k"].nbytes), close(formula(inputs)))


def quest_step(length: int, device: str) -> Work:
    """A decode step that reads the pages of 16 with the highest bounds, 2048 keys for each kv head; peers read all."""
    inputs = keys(length, device)
    inputs |= {"v": randn(1, 8, length, 128, device=device, seed=2), "summary": extremes(inputs)}
    inputs |= {f"new_{name}": inputs[name][:, :, -1:].clone() for name in ("k", "v")}

    def pages(i: Inputs) -> tuple[Tensor, Tensor]:
        scores = longctx.page_scores(i["q"], i["summary"], head_reduce="group_max")
        return longctx.topk_select(scores, min(2048, length) // PAGE, num_last=1)

    def step(i: Inputs) -> Tensor:
        summary = {"summary": i["summary"], "summary_page_size": PAGE}
        longctx.append_kv(i["k"], i["v"], i["new_k"], i["new_v"], length - 1, **summary)
        return longctx.gather_attention(i["q"], i["k"], i["v"], *pages(i), block_size_k=PAGE)[0]

    def check(name: str, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        k, v = inputs["k"], inputs["v"]
        if name == "longctx":
            k, v = gpu_gather.rows(inputs | {"indices": pages(inputs)[0], "block_size_k": PAGE})
        k, v = (x.float().repeat_interleave(GROUP, dim=1) for x in (k, v))
        exact = torch.softmax(128**-0.5 * inputs["q"].float() @ k.mT, dim=-1) @ v
        torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)

    read = inputs["summary"].nbytes + 2.0 * 8 * min(2048, length) * 128 * 2
    return Work(inputs, {"longctx": step, **peers.decode(inputs)}, 0.0, read, check)


def clusters(length: int, device: str) -> Work:
    """5% of the keys as clusters, 10 iterations, 8 heads; torch starts from the first keys, which costs nothing."""
    heads, dim, count, num_iters = 8, 128, max(1, length // 20), 10
    of = torch.arange(length, device=device) % count
    centres = randn(1, heads, count, dim, device=device, seed=0)
    inputs = {"keys": centres[:, :, of] + 2 * randn(1, heads, length, dim, device=device, seed=1)}

    def means(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sizes = points.new_zeros(heads, count).scatter_add_(1, labels, points.new_ones(heads, length))
        sums = points.new_zeros(heads, count, dim)
        sums.scatter_add_(1, labels[..., None].expand(-1, -1, dim), points)
        return sums / sizes.clamp(min=1)[..., None], sizes

    def lloyd(i: Inputs) -> tuple[Tensor, Tensor]:
        points = i["keys"][0].float()
        centroids = points[:, :count]
        for _ in range(num_iters + 1):
            labels = torch.baddbmm(-0.5 * centroids.square().sum(-1)[:, None], points, centroids.mT).argmax(dim=-1)
            found, sizes = means(points, labels)
            centroids = torch.where(sizes[..., None] > 0, found, centroids)
        return centroids, labels

    def spread(labels: Tensor) -> float:
        points = inputs["keys"][0].float()
        found, sizes = means(points, labels)
        return float(points.square().sum() - (sizes * found.square().sum(-1)).sum())

    def check(name: str, output: Any) -> None:
        """Clusters as tight as the planted ones; of all keys under any labels the spread is a quarter more."""
        labels = output[1].view(heads, length).long()
        if spread(labels) > 1.1 * spread(of.expand(heads, -1)):
            raise ValueError("clusters are not tight")
        if name == "longctx":
            found, sizes = means(inputs["keys"][0].float(), labels)
            torch.testing.assert_close(output[0][0].float(), found, atol=5e-2, rtol=2e-2)
            torch.testing.assert_close(output[2][0].float(), sizes, atol=0, rtol=0)

    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.kmeans(i["keys"], count, num_iters=num_iters, metric="euclidean"),
        "torch": lloyd,
    }
    flops = 2.0 * (num_iters + 1) * heads * length * count * dim
    return Work(inputs, contenders, flops, float(inputs["keys"].nbytes), check)


def case(title: str, length: int, **options: Any) -> GpuCase:
    return gpu_case(title, "topk_select", length, topk, **({"dtype": torch.float32} | options))


QUEST = "a step of Quest, pages of 16, 2048 keys, heads 32/8"
HEADLINE = [
    case(ROWS.format("random"), 128 * K),
    gpu_case(QUEST, "policy", 128 * K, quest_step),
]
OTHERS = [
    *(case(ROWS.format(kind), 128 * K, kind=kind) for kind in ("constant", "16 values", "between 1 and 1.1")),
    *(case(ROWS.format(kind), 1024 * K, kind=kind) for kind in ("random", "ascending")),
    case("2048, 8 rows, random bf16", 128 * K, dtype=torch.bfloat16),
    case("100000, 1 row, random", 1024 * K, rows=1, kept=100_000),
    case("2048, 256 rows, random", 128 * K, rows=256),
    case("128 of 8192 pages, 64 rows", 8 * K, rows=64, kept=128),
    gpu_case("half of the softmax, 8 rows", "threshold_select", 128 * K, share),
    gpu_case("extremes of pages of 16, 8 heads", "summarize_pages", 128 * K, summaries),
    gpu_case("one new key, pages of 16, 8 heads", "update_pages", 128 * K, updates),
    gpu_case("one new token, pages of 16, 8 heads", "append_kv", 128 * K, appended),
    gpu_case("extremes of pages of 16, heads 32/8, one token", "page_scores", 128 * K, page_bounds),
    gpu_case("all keys, heads 32/8, one token", "token_scores", 128 * K, key_products),
    gpu_case("5% clusters, 10 iterations, 8 heads", "kmeans", 32 * K, clusters),
]
