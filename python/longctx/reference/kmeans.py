"""Naive twin of `longctx.kmeans`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

BITS = (1 << 64) - 1


def uniform(seed: int, r: int) -> float:
    """`u_r`: SplitMix64, its upper 53 bits as a fraction."""
    z = (seed + (r + 1) * 0x9E3779B97F4A7C15) & BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def square_distances(points: Tensor, centroids: Tensor, nothing: float = 0.0) -> Tensor:
    """0 where they are below `nothing` times the square of the point."""
    distances = (points[:, None] - centroids[None]).square().sum(dim=-1)
    return distances.masked_fill(distances <= nothing * points.square().sum(dim=-1, keepdim=True), 0.0)


def draw(mass: list[float], m: int, offset: float) -> list[int]:
    """The points at which the running sum passes a mark."""
    drawn, total, running, t = [], sum(mass), 0.0, 0
    for i, weight in enumerate(mass):
        running += weight
        before = t
        while weight > 0.0 and t < m and (t + offset) * (total / m) < running:
            t += 1
        if t > before:
            drawn.append(i)
    return drawn


def seeds(points: Tensor, weights: Tensor, wanted: int, seed: int, nothing: float) -> list[int]:
    chosen = [min(int(uniform(seed, 0) * len(points)), len(points) - 1)] if len(points) else []
    drawn, r = list(chosen), 0
    while drawn and len(chosen) < wanted:
        r += 1
        mass = weights * square_distances(points, points[chosen], nothing).min(dim=1).values
        mass[chosen] = 0.0
        drawn = draw(mass.tolist(), min(len(chosen), (wanted - len(chosen) + 1) // 2), uniform(seed, r))
        chosen += drawn
    return chosen


def nearest(points: Tensor, centroids: Tensor, nothing: float) -> tuple[list[int], list[float]]:
    """The lowest number among the nearest centroids, and the squared distance; NaN centroids are none."""
    exact = square_distances(points, centroids).nan_to_num(nan=math.inf)
    labels = [row.index(min(row)) for row in exact.tolist()]
    distances = square_distances(points, centroids, nothing).tolist()
    return labels, [row[label] for row, label in zip(distances, labels, strict=True)]


def fill_empty(labels: list[int], distances: list[float], num_clusters: int) -> list[int]:
    labels = list(labels)
    far_first = sorted(range(len(labels)), key=lambda i: (-distances[i], i))
    for empty in (cluster for cluster in range(num_clusters) if cluster not in set(labels)):
        while far_first:
            i = far_first.pop(0)
            if distances[i] > 0.0 and labels.count(labels[i]) > 1:
                labels[i] = empty
                break
    return labels


def means(rows: Tensor, weights: Tensor, labels: list[int], otherwise: Tensor) -> Tensor:
    result = otherwise.clone()
    of = torch.tensor(labels, dtype=torch.int64)
    for cluster in set(labels):
        members = of == cluster
        result[cluster] = (weights[members, None] * rows[members]).sum(dim=0) / weights[members].sum()
    return result


def kmeans(
    keys: Tensor,
    num_clusters: int,
    *,
    num_iters: int = 10,
    seed: int = 0,
    metric: Literal["cosine", "euclidean"] = "cosine",
    counts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(centroids, labels, counts)`, every step as its docstring says; see `longctx.kmeans`."""
    batch, heads, n, dim = keys.shape
    nothing = 2.0**-46 if keys.dtype == torch.float64 else 2.0**-18
    centroids = keys.new_zeros(batch, heads, num_clusters, dim)
    labels = torch.full((batch, heads, n), -1, dtype=torch.int32)
    sizes = torch.zeros(batch, heads, num_clusters, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            weights = torch.ones(n) if counts is None else counts[b, h].double().clamp(min=0)
            weights[n if lengths is None else min(max(int(lengths[b, h]), 0), n) :] = 0.0
            exists = weights > 0.0
            rows, weights = keys[b, h, exists].double(), weights[exists].double()
            points = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300) if metric == "cosine" else rows
            first = seeds(points, weights, min(num_clusters, len(rows)), seed, nothing)
            centres = torch.full((num_clusters, dim), math.nan, dtype=torch.float64)
            centres[: len(first)] = points[first]
            found, distances = nearest(points, centres, nothing)
            for _ in range(num_iters):
                centres = means(points, weights, fill_empty(found, distances, num_clusters), centres)
                found, distances = nearest(points, centres, nothing)
            zeros = torch.zeros(num_clusters, dim, dtype=torch.float64)
            centroids[b, h] = means(rows, weights, found, zeros).to(keys.dtype)
            labels[b, h, exists] = torch.tensor(found, dtype=torch.int32)
            for label, weight in zip(found, weights.tolist(), strict=True):
                sizes[b, h, label] += int(weight)
    return centroids, labels, sizes
