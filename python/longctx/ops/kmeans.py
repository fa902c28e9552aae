"""kmeans: keys -> centroids, the cluster of each key, and the sizes of the clusters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op


def kmeans(
    keys: Tensor,
    num_clusters: int,
    *,
    num_iters: int = 10,
    seed: int = 0,
    metric: Literal["cosine", "euclidean"] = "cosine",
    counts: Tensor | None = None,
    lengths: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters the keys of each (batch entry, head) by Lloyd's algorithm, the same way in every run.

    Points `x_i` are the keys (`euclidean`), or the keys scaled to length 1 (`cosine`; a key of zeros stays one). With
    centroids `c_j` of the points, and weights `w_i = counts_i`:

    1. Seeding. The first centroid is point `floor(u_0 * points)`. Each round `r = 1, 2, ..` draws as many as there are,
       but at most half of what is missing: with `D_i` the squared distance of a point to its nearest centroid, 0 for
       those drawn before, the `m` marks `(t + u_r) / m * sum(w D)`, `t = 0 .. m - 1`, each draw the first point at
       which the running sum of `w_i D_i` passes them; a point that several marks fall on is drawn once. `u_r` in [0, 1)
       is SplitMix64 of `seed` and `r`, the same for every head. Seeding ends at `num_clusters`, or when no point is off
       all centroids. Up to `2**-18` times `|x_i|**2` (`2**-46` for float64) a squared distance is rounding and counts
       as 0.
    2. `num_iters` times: every point belongs to its nearest centroid, the lowest number among equals; an empty cluster
       (in ascending order) takes the point that is farthest from its centroid, the lowest index among equals, unless
       it is the last of its cluster or lies on its centroid; centroids become the weighted means of their points. A
       cluster that stays empty keeps its centroid. Iterations that would change nothing are not made.
    3. Labels are the nearest centroids. The centroids that are returned are the weighted means of the clusters' keys
       *as given*, not scaled, which is what Squeezed Attention scores.

    Levels are compositions: centroids are keys that stand for as many as their cluster has, so the next coarser level
    is `kmeans(centroids, fewer, counts=counts)`, and a key's coarse label is its fine label's.

    Args:
        keys: `[batch, heads, n, dim]`, float32, float64 (CPU), bfloat16 or float16; any strides with a contiguous last
            dim. CUDA: a dim of at most 256.
        num_clusters: from 1 to `2**24`; may exceed `n`, then clusters stay empty.
        num_iters: updates of the centroids; 0 returns the clusters of the seeds.
        seed: of the draws, any int64.
        metric: see above.
        counts: int32 `[batch, heads, n]`: how many keys a row stands for; rows with 0 do not exist. `None`: 1.
        lengths: int32 `[batch, heads]`: rows at or beyond it do not exist. Clamped to `[0, n]`.
        validate: also check that counts are not negative and that lengths lie in `[0, n]` (reads them).

    Returns:
        `centroids [batch, heads, num_clusters, dim]` in the dtype of `keys`, 0 for an empty cluster;
        `labels` int32 `[batch, heads, n]`, -1 where there is no key;
        `counts` int32 `[batch, heads, num_clusters]`, the keys of each cluster.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `2 * n * num_clusters * dim` FLOPs per head for seeding and for each iteration: an assignment is a matrix
    product whose result is never stored. Scratch of about `4 * n * (dim + 10)` bytes, of one head at a time; on CUDA
    `29 * n + 4 * num_clusters * (dim + 35)`, of all heads. Products in float32 (float64 for float64), means in float64,
    masses summed as integers. Deterministic, independent of the number of threads and of the other heads; AVX2, AVX-512
    and CUDA give the same bits, generic code rounds otherwise. On CUDA the number of launches follows from the shapes
    and `num_iters`, and nothing waits.
    Gradients: none yet (the backward raises NotImplementedError).
    Source: Hooper et al., "Squeezed Attention" (arXiv 2411.09688); Arthur and Vassilvitskii, "k-means++" (2007), drawn
    in rounds as by Bahmani et al., "Scalable k-means++" (arXiv 1203.6402).

    Example:
        >>> import torch, longctx
        >>> keys = torch.tensor([1.0, 9.0, 1.1, 9.1, 1.2]).view(1, 1, 5, 1)
        >>> centroids, labels, counts = longctx.kmeans(keys, 2, metric="euclidean")
        >>> low, high = centroids.flatten().sort().values.tolist()
        >>> round(low, 2), round(high, 2)
        (1.1, 9.05)
        >>> labels[0, 0, 0] == labels[0, 0, 2], sorted(counts.flatten().tolist())
        (tensor(True), [2, 3])
    """
    if validate:
        _validate.lengths("kmeans", "lengths", lengths, keys.shape[2])
        _validate.counts("kmeans", "counts", counts, torch.iinfo(torch.int32).max)
    result: tuple[Tensor, Tensor, Tensor] = call(
        torch.ops.longctx.kmeans, keys, num_clusters, num_iters, seed, metric, counts, lengths
    )
    return result


def _fake(keys: Tensor, num_clusters: int, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n, dim = keys.shape
    return (
        keys.new_empty((batch, heads, num_clusters, dim)),
        keys.new_empty((batch, heads, n), dtype=torch.int32),
        keys.new_empty((batch, heads, num_clusters), dtype=torch.int32),
    )


register_op("kmeans", _fake)
