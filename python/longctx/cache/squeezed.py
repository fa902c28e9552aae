"""Squeezed Attention: keys of a fixed context in clusters; a token reads the clusters that weigh enough.

Hooper et al., "Squeezed Attention: Accelerating Long Context Length LLM Inference" (arXiv 2411.09688).

When a prompt is over, the keys in front of its last tokens, the observation window, are clustered by direction. A
cluster of n keys with centroid C weighs exp(q C) / sum n_j exp(q C_j): what each of its keys would get. Of the weights
that the queries of the window see, over all layers and heads, one threshold is taken, below which the share `sparsity`
of the keys lies. So heads that look at one place read little, and others much. With a coarser level, clusters of
clusters are weighed first, and only the clusters in those that weigh enough are looked at, and counted.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.clusters import cluster_rows, quantile, weigh, weigh_kept
from longctx.ops import gather_attention, threshold_select


class SqueezedLayer(LongctxLayer):
    STATE: ClassVar[tuple[str, ...]] = (
        "q_window",
        "lengths",
        "centroids",
        "labels",
        "sizes",
        "threshold",
        "coarse_centroids",
        "coarse_labels",
        "coarse_sizes",
        "coarse_threshold",
    )
    PLAIN: ClassVar[tuple[str, ...]] = (*LongctxLayer.PLAIN, "fixed", "scale")
    q_window: Tensor | None  # [batch, num_q_heads, window, head_dim] of a prompt whose keys are not clustered yet
    lengths: Tensor | None  # int32 [batch]: the clustered keys of each row
    centroids: Tensor | None  # [batch, num_kv_heads, clusters, head_dim]
    labels: Tensor | None  # int64 [batch, num_kv_heads, 1, fixed]
    sizes: Tensor | None  # int32 [batch, num_kv_heads, clusters]
    threshold: Tensor | None  # float32 [batch]
    coarse_centroids: Tensor | None
    coarse_labels: Tensor | None  # int64 [batch, num_kv_heads, clusters]
    coarse_sizes: Tensor | None
    coarse_threshold: Tensor | None
    peers: list[SqueezedLayer]  # all layers of the cache

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        sparsity: float,
        clusters: float,
        coarse_sparsity: float | None,
        coarse_clusters: float,
        window_size: int,
        num_iters: int,
        seed: int,
        **shapes: Any,
    ) -> None:
        self.sparsity, self.clusters = sparsity, clusters
        self.coarse_sparsity, self.coarse_clusters = coarse_sparsity, coarse_clusters
        self.window_size, self.num_iters, self.seed = window_size, num_iters, seed
        super().__init__(config, layer_idx, **shapes)

    def reset(self) -> None:
        super().reset()
        self.fixed = 0  # clustered keys of the longest row
        self.scale: float | None = None

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self.q_window, self.scale = q[:, :, -self.window_size :].clone(), context.softmax_scale

    def make_room(self, seqlen_q: int) -> None:
        """Clusters the prompt, of all layers, when it is over; a long call may be its next chunk."""
        if self.q_window is None or seqlen_q > self.max_seqlen_q:
            return
        for layer in self.peers:
            layer._cluster()
        found = [layer for layer in self.peers if layer.centroids is not None]
        if not found:  # the window is the whole prompt
            for layer in self.peers:
                layer.q_window = None
            return
        if self.coarse_sparsity is not None:
            weights = [layer._coarse_weights(layer._all(layer.q_window)) for layer in found]
            sizes = [layer._all(layer.coarse_sizes) for layer in found]
            threshold = quantile(weights, sizes, self.coarse_sparsity)
            for layer in found:
                layer.coarse_threshold = threshold.clone()  # files hold no tensor twice
        weights = [layer._weights(layer._all(layer.q_window), once=True) for layer in found]
        threshold = quantile(weights, [layer._all(layer.sizes) for layer in found], self.sparsity)
        for layer in self.peers:
            layer.threshold, layer.q_window = threshold.clone(), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        if self.centroids is None:
            return super().attend(q, k, v, context)
        heads, seqlen_q = k.shape[1], q.shape[2]
        weights = self._weights(q) - self._all(self.threshold)[:, None, None]
        of_keys = weights[:, :, None].gather(3, self._all(self.labels))
        lengths = self._all(self.lengths)[:, None, None].expand(-1, heads, 1)
        indices, counts = threshold_select(of_keys, value=0.0, max_k=self.fixed, lengths=lengths)
        later = k.shape[2] - self.fixed
        self.count(round(float(counts.float().mean())) + later, seqlen_q)
        out, lse = gather_attention(
            q,
            k,
            v,
            indices.expand(-1, -1, seqlen_q, -1),
            counts.expand(-1, -1, seqlen_q),
            num_last=later,
            workspace=self.workspace(q),
            **context.score_options(),
        )
        return context.weigh_sinks(out, lse)

    def cropped(self) -> None:
        """Clusters stay as long as all their keys do."""
        if self.slots < self.fixed:
            self._forget()

    def _forget(self) -> None:
        self.fixed = 0
        for name in self.STATE:
            setattr(self, name, None)

    def _cluster(self) -> None:
        """Makes clusters of all keys but the window's."""
        q_window = self.q_window
        self._forget()
        self.q_window = q_window
        fixed = self.slots - self.window_size
        if fixed < 1 or self.keys is None:
            return
        rows = torch.full((self.batch_size,), self.slots, device=self.device) if self.rows is None else self.rows
        self.lengths, self.fixed = (rows - self.window_size).clamp(min=0).int(), fixed
        of_heads = self.lengths[:, None].expand(self.keys.shape[:2])
        self.centroids, labels, self.sizes = self._kmeans(self.keys[:, :, :fixed], self.clusters, lengths=of_heads)
        self.labels = labels[:, :, None]
        if self.coarse_sparsity is not None:
            self.coarse_centroids, self.coarse_labels, self.coarse_sizes = self._kmeans(
                self.centroids, self.coarse_clusters, counts=self.sizes
            )

    def _kmeans(self, keys: Tensor, share: float, **given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [max(1, round(share * length)) for length in self._all(self.lengths).tolist()]
        return cluster_rows(keys, wanted, num_iters=self.num_iters, seed=self.seed, **given)

    @staticmethod
    def _all(tensor: Tensor | None) -> Tensor:
        """What a prompt and its clustering have set."""
        assert tensor is not None
        return tensor

    def _coarse_weights(self, q: Tensor) -> Tensor:
        return weigh(q, self._all(self.coarse_centroids), self._all(self.coarse_sizes), self.scale)

    def _weights(self, q: Tensor, once: bool = False) -> Tensor:
        """Of a key of each cluster: float32 [batch, num_kv_heads, clusters]; -inf: none.

        Centroids are read as far as the coarser level says; `once`, for the many queries of a window, all of them.
        """
        centroids, sizes = self._all(self.centroids), self._all(self.sizes)
        if self.coarse_sparsity is None:
            return weigh(q, centroids, sizes, self.scale)
        kept = self._coarse_weights(q) >= self._all(self.coarse_threshold)[:, None, None]
        kept = kept.gather(2, self._all(self.coarse_labels))
        return (
            weigh(q, centroids, sizes * kept, self.scale) if once else weigh_kept(q, centroids, sizes, kept, self.scale)
        )


class SqueezedCache(LongctxCache):
    """Reads the observation window, what came after it, and of the prompt before it the clusters that weigh enough.

    Args:
        config: `model.config`.
        sparsity: share of the clustered keys that the queries of the window would leave out, over all layers and heads;
            0.5 to 0.9 in the paper. 0 reads everything.
        clusters: number of clusters, as a share of the keys; 0.05 in the paper.
        coarse_sparsity: a second, coarser level of clusters leaves out this share of the keys first, whose clusters are
            then not read at all. `None`: one level.
        coarse_clusters: number of coarse clusters, as a share of the keys.
        window_size: tokens at the end of the prompt that set the threshold and are always read; 100 in the paper.
        num_iters: of k-means.
        seed: of k-means.

    Keeps all keys. The prompt itself is read exactly; clustering it costs `2 * clusters * num_iters * n**2 * head_dim`
    FLOPs per kv head, once, when the first token is decoded. Several tokens in a call share one selection. A later
    prompt of more than 16 tokens runs dense, and all keys are clustered again. Weights of clusters know no softcap.
    Do not use it for a prompt that few tokens follow, or for keys without clusters; nor a second level where the
    clusters are few enough to be read: it may leave out what the first would have found.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.SqueezedCache(model.config, sparsity=0.8, window_size=40)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=3)
        >>> cache.stats().share < 1
        True
    """

    name: ClassVar[str] = "squeezed"

    def __init__(
        self,
        config: Any,
        *,
        sparsity: float = 0.7,
        clusters: float = 0.05,
        coarse_sparsity: float | None = None,
        coarse_clusters: float = 0.01,
        window_size: int = 100,
        num_iters: int = 10,
        seed: int = 0,
    ) -> None:
        require("window_size", window_size, at_least=1)
        require("num_iters", num_iters, at_least=0)
        for option, value in (("sparsity", sparsity), ("coarse_sparsity", coarse_sparsity)):
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"longctx: `{option}` must be at least 0 and below 1; got {value}")
        for option, value in (("clusters", clusters), ("coarse_clusters", coarse_clusters)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"longctx: `{option}` must be above 0 and at most 1; got {value}")
        options = {
            "sparsity": sparsity,
            "clusters": clusters,
            "coarse_sparsity": coarse_sparsity,
            "coarse_clusters": coarse_clusters,
            "window_size": window_size,
            "num_iters": num_iters,
            "seed": seed,
        }
        super().__init__(config, SqueezedLayer, options)
        self._join()

    def fork(self) -> LongctxCache:
        twin = super().fork()
        assert isinstance(twin, SqueezedCache)
        twin._join()
        return twin

    def _join(self) -> None:
        layers: list[Any] = self.layers
        for layer in layers:
            layer.peers = layers
