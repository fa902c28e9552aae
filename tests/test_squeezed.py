"""`SqueezedCache` against a dense run that is masked by its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from cache_cases import CLOSE, decode, logits, masked_run, ours
from longctx.cache import SqueezedCache, clusters, load
from longctx.cache.clusters import quantile, weigh, weigh_kept
from op_case import randn
from transformers_models import tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
PROMPT, WINDOW, LENGTH = 60, 10, 64
FIXED = PROMPT - WINDOW
INPUT = tokens(2, LENGTH, seed=4)
OPTIONS = {"sparsity": 0.6, "clusters": 0.3, "window_size": WINDOW, "num_iters": 3}
LEVELS = {"one": {}, "two": {"coarse_sparsity": 0.3, "coarse_clusters": 0.1}}


def weights(q: Tensor, centroids: Tensor, counts: Tensor) -> Tensor:
    """[batch, kv heads, clusters]: exp(q C) / sum n exp(q C), averaged over the rows of q and the group's heads."""
    scores = q @ centroids.repeat_interleave(2, 1).mT * q.shape[3] ** -0.5
    counts = counts.repeat_interleave(2, 1)[:, :, None].double()
    scores = scores.double().exp()
    weighed = scores / (counts * scores).sum(-1, keepdim=True)
    return weighed.masked_fill(counts == 0, -torch.inf).mean(2).unflatten(1, (2, 2)).mean(2)


def threshold(of_layers: list[tuple[Tensor, Tensor]], sparsity: float) -> Tensor:
    """[batch, 1, 1]: the lowest weight of the heaviest 1 - sparsity of all keys."""
    result = []
    for b in range(2):
        keys = torch.cat([w[b].flatten().repeat_interleave(n[b].flatten()) for w, n in of_layers])
        kept = -(-(round((1 - sparsity) * 1000) * len(keys)) // 1000)
        result.append(keys.sort(descending=True).values[kept - 1])
    return torch.stack(result)[:, None, None]


class Definition:
    """One layer: the clusters of its fixed keys and what a query's weights are."""

    def __init__(self, q: Tensor, k: Tensor, coarse: bool) -> None:
        self.window = q[:, :, FIXED:PROMPT]
        keys = k[:, :, :FIXED]
        self.centroids, self.labels, self.counts = longctx.reference.kmeans(keys, 15, num_iters=3)
        if coarse:
            self.coarse = longctx.reference.kmeans(self.centroids, 5, num_iters=3, counts=self.counts)
        self.coarse_threshold: Tensor | None = None

    def coarse_weights(self, q: Tensor) -> Tensor:
        return weights(q, self.coarse[0], self.coarse[2])

    def kept_counts(self, q: Tensor) -> Tensor:
        if self.coarse_threshold is None:
            return self.counts
        kept = self.coarse_weights(q) >= self.coarse_threshold
        return self.counts * kept.gather(2, self.coarse[1].clamp(min=0).long())

    def weights(self, q: Tensor) -> Tensor:
        return weights(q, self.centroids, self.kept_counts(q))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many centroids each call of a single token scored."""
    numbers: list[int] = []

    def all_of_them(q: Tensor, centroids: Tensor, **options: Any) -> Tensor:
        if q.shape[2] == 1:
            numbers.append(centroids[..., 0].numel())
        return longctx.page_scores(q, centroids, **options)

    def listed(q: Tensor, centroids: Tensor, *, candidates: Tensor, **options: Any) -> Tensor:
        numbers.append(int((candidates >= 0).sum()))
        return longctx.token_scores(q, centroids, candidates=candidates, **options)

    monkeypatch.setattr(clusters, "page_scores", all_of_them)
    monkeypatch.setattr(clusters, "token_scores", listed)
    return numbers


@pytest.mark.parametrize("level", LEVELS)
def test_reads_the_clusters_that_weigh_enough(level: str, scored: list[int]) -> None:
    """And scores the centroids of the coarser level, and those of the finer level below what was chosen."""
    seen: list[Definition] = []

    def record(q: Tensor, k: Tensor) -> Tensor:
        seen.append(Definition(q, k, level == "two"))
        return torch.ones(2, 4, LENGTH, LENGTH, dtype=torch.bool)

    masked_run(INPUT, PROMPT, record)
    if level == "two":
        coarse = threshold([(layer.coarse_weights(layer.window), layer.coarse[2]) for layer in seen], 0.3)
        for layer in seen:
            layer.coarse_threshold = coarse
    cut = threshold([(layer.weights(layer.window), layer.counts) for layer in seen], 0.6)
    layers = iter(seen)
    read, centroids = [], []

    def visible(q: Tensor, k: Tensor) -> Tensor:
        layer, mask = next(layers), torch.ones(2, 4, LENGTH, LENGTH, dtype=torch.bool)
        for row in range(PROMPT, LENGTH):
            keys = layer.weights(q[:, :, row : row + 1]).gather(2, layer.labels.long()) >= cut
            mask[:, :, row, :FIXED] = keys.repeat_interleave(2, 1)
            read.append(keys.double().mean())
            below = int((layer.kept_counts(q[:, :, row : row + 1]) > 0).sum())
            centroids.append(below + layer.coarse[0][..., 0].numel() if level == "two" else layer.counts.numel())
        return mask

    expected = masked_run(INPUT, PROMPT, visible)
    assert 0.1 < float(torch.stack(read).mean()) < 0.7
    model = ours()
    cache = SqueezedCache(model.config, **OPTIONS, **LEVELS[level])
    torch.testing.assert_close(decode(model, INPUT, cache, PROMPT), expected, **CLOSE)
    assert cache.stats().share < 0.75
    assert sum(scored) == sum(centroids)
    assert level == "one" or sum(scored) < 8 * seen[0].counts.numel()  # 4 tokens, 2 layers


def test_one_threshold_for_the_model() -> None:
    """Every layer has the same, of each row alone; heads then read different numbers of keys."""
    model = ours()
    cache = SqueezedCache(model.config, **OPTIONS)
    decode(model, INPUT, cache, PROMPT)
    first, second = cache.layers
    assert torch.equal(first.threshold, second.threshold)
    alone = SqueezedCache(model.config, **OPTIONS)
    decode(model, INPUT[1:], alone, PROMPT)
    torch.testing.assert_close(alone.layers[0].threshold, first.threshold[1:])


def test_quantile() -> None:
    heavy, light = torch.tensor([[[0.5, 0.3]]]), torch.tensor([[[0.2, 0.1, -torch.inf]]])
    counts = [torch.tensor([[[2, 3]]], dtype=torch.int32), torch.tensor([[[4, 1, 0]]], dtype=torch.int32)]
    for sparsity, expected in ((0.0, -torch.inf), (0.05, 0.1), (0.1, 0.2), (0.5, 0.3), (0.51, 0.3), (0.8, 0.5)):
        assert quantile([heavy, light], counts, sparsity).item() == pytest.approx(expected)


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_what_is_not_kept_does_not_count(seqlen_q: int) -> None:
    """As if it had no keys, of several tokens too; NaN shows that it is not read."""
    q, centroids = randn(2, 4, seqlen_q, 8, seed=1), randn(2, 2, 6, 8, seed=2)
    sizes = torch.tensor([3, 0, 1, 5, 2, 4], dtype=torch.int32).expand(2, 2, -1)
    kept = torch.ones(2, 2, 6, dtype=torch.bool)
    kept[0, 0, 2] = kept[1, :, 3:] = kept[0, 1] = False
    expected = weigh(q, centroids, sizes * kept, 0.5)
    found = weigh_kept(q, centroids.masked_fill(~kept[..., None], torch.nan), sizes, kept, 0.5)
    torch.testing.assert_close(found, expected)
    assert torch.isneginf(found[0, 1]).all()


def test_forks_files_and_rewinding_keep_the_clusters(tmp_path: Path) -> None:
    model = ours()
    cache = SqueezedCache(model.config, **OPTIONS)
    logits(model, INPUT[:, :PROMPT], cache)
    early = cache.fork()  # not clustered yet
    expected = decode(model, INPUT[:, PROMPT:], cache, 1)
    torch.testing.assert_close(decode(model, INPUT[:, PROMPT:], early, 1), expected)
    assert early.layers[0].peers[1] is early.layers[1]
    cache.save(tmp_path / "cache")
    again = [logits(model, INPUT[:, :1], c) for c in (load(tmp_path / "cache", model.config), cache.fork(), cache)]
    assert torch.equal(again[0], again[2])
    assert torch.equal(again[1], again[2])
    centroids = cache.layers[0].centroids
    cache.rewind(LENGTH + 1 - PROMPT)
    torch.testing.assert_close(decode(model, INPUT[:, PROMPT:], cache, 1), expected)
    assert cache.layers[0].centroids is centroids
    cache.rewind(LENGTH - FIXED + 1)  # into the clustered keys
    assert cache.layers[0].centroids is None


def test_a_short_prompt_is_read_whole() -> None:
    model = ours()
    cache = SqueezedCache(model.config, **OPTIONS | {"window_size": PROMPT})
    dense = longctx.cache.DenseCache(model.config)
    assert torch.equal(decode(model, INPUT, cache, PROMPT), decode(model, INPUT, dense, PROMPT))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "`sparsity` must be at least 0 and below 1; got 1.0"),
        ({"coarse_sparsity": -0.1}, "`coarse_sparsity` must be at least 0 and below 1; got -0.1"),
        ({"clusters": 0.0}, "`clusters` must be above 0 and at most 1; got 0.0"),
        ({"coarse_clusters": 1.5}, "`coarse_clusters` must be above 0 and at most 1; got 1.5"),
        ({"window_size": 0}, "`window_size` must be at least 1; got 0"),
        ({"num_iters": -1}, "`num_iters` must be at least 0; got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SqueezedCache(ours().config, **options)
