"""Clusters of keys and what they weigh for a query: the arithmetic of Squeezed Attention (arXiv 2411.09688).

A cluster of n keys with centroid C weighs exp(q C) / sum n_j exp(q C_j), for each of its keys alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.ops import kmeans, page_scores, threshold_select, token_scores


def cluster_rows(keys: Tensor, num_clusters: Sequence[int], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`kmeans` with a number of clusters for each row of the batch; those that a row does not have are empty.

    Tensors among `options` are `[batch, ..]`. Labels are int64, and 0 where there is no key.
    """
    parts = []
    for row, clusters in enumerate(num_clusters):
        own: dict[str, Any] = {n: x[row : row + 1] if isinstance(x, Tensor) else x for n, x in options.items()}
        parts.append(kmeans(keys[row : row + 1], clusters, **own))
    missing = [max(num_clusters) - clusters for clusters in num_clusters]
    centroids = torch.cat([pad(part[0], (0, 0, 0, more)) for part, more in zip(parts, missing, strict=True)])
    sizes = torch.cat([pad(part[2], (0, more)) for part, more in zip(parts, missing, strict=True)])
    return centroids, torch.cat([part[1] for part in parts]).clamp(min=0).long(), sizes


def quantile(weights: Sequence[Tensor], counts: Sequence[Tensor], sparsity: float) -> Tensor:
    """The lowest weight that the heaviest `1 - sparsity` of all keys have: float32 [batch], -inf for a sparsity of 0.

    Args:
        weights: of the clusters of each layer, float32 [batch, heads, clusters].
        counts: int32, alike: their keys.
    """
    flat, order = torch.cat([x.flatten(1) for x in weights], dim=1).sort(dim=1, descending=True)
    keys = torch.cat([x.flatten(1) for x in counts], dim=1).gather(1, order).cumsum(1)
    if sparsity == 0.0:
        return torch.full_like(flat[:, 0], -torch.inf)
    last = (keys < (1.0 - sparsity) * keys[:, -1:].double()).sum(1, keepdim=True)
    return flat.gather(1, last.clamp(max=flat.shape[1] - 1))[:, 0]


def weigh(q: Tensor, centroids: Tensor, sizes: Tensor, scale: float | None) -> Tensor:
    """Weights of all clusters, averaged over tokens and the heads of a group.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`.
        centroids: `[batch, num_kv_heads, clusters, head_dim]`.
        sizes: int32 `[batch, num_kv_heads, clusters]`; a cluster of size 0 does not exist.

    Returns:
        float32 `[batch, num_kv_heads, clusters]`; -inf: none.
    """
    options: dict[str, Any] = {"method": "dot", "head_reduce": "group_mean", "query_reduce": "mean", "softmax": True}
    weights = page_scores(q, centroids, counts=sizes, softmax_scale=scale, **options)
    return weights[:, :, 0]


def weigh_kept(q: Tensor, centroids: Tensor, sizes: Tensor, kept: Tensor, scale: float | None) -> Tensor:
    """`weigh`, of the clusters that are `kept` (bool like `sizes`) alone: no other is read, and no other counts.

    Reads on the host how many these are, so that the arithmetic around them is no longer than they are.
    """
    listed, counts = threshold_select((kept & (sizes > 0)).float(), value=1.0, max_k=kept.shape[2])
    listed = listed[..., : max(int(counts.max()), 1)].contiguous()
    # As heads, tokens have no order, and all of them see all centroids.
    rows = q.flatten(1, 2)[:, :, None]
    scores = token_scores(rows, centroids, candidates=listed[:, :, None], softmax_scale=scale)
    scores = scores[:, :, 0].unflatten(1, (sizes.shape[1], -1))
    index = listed.clamp(min=0).long()
    total = (scores + sizes.gather(2, index).log()[:, :, None]).logsumexp(-1, keepdim=True)
    weights = (scores - total).exp().mean(2).masked_fill(listed < 0, -torch.inf)
    # One more place takes what stands for no cluster.
    every: Tensor = weights.new_full((*sizes.shape[:2], sizes.shape[2] + 1), -torch.inf)
    every = every.scatter(2, index.masked_fill(listed < 0, sizes.shape[2]), weights)
    return every[..., :-1]
