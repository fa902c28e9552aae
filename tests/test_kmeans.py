"""`kmeans` against its twin, and what its docstring promises."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES
from checks import assert_same_bits, record
from longctx.testing import available_isas
from op_case import DTYPES, Call, generator, int32, randn

METRICS = ("cosine", "euclidean")
WIDE = tuple(dtype for dtype in (torch.float64, torch.float32) if dtype in DTYPES)


def planted(
    dtype: torch.dtype, *, clusters: int = 9, each: int = 31, dim: int = 24, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys [2, 2, clusters * each, dim] around far apart centres, shuffled, and the number of each key's centre."""
    centres = 8 * torch.nn.functional.normalize(randn(2, 2, clusters, dim, seed=seed), dim=-1)
    of = torch.arange(clusters * each).remainder(clusters)[torch.randperm(clusters * each, generator=generator(seed))]
    noise = 0.1 * randn(2, 2, clusters * each, dim, seed=seed + 1)
    return (centres[:, :, of] + noise).to(dtype), of


def inertia(keys: Tensor, labels: Tensor, metric: str) -> Tensor:
    """[batch, heads]: the sum of squared distances to the means of the points, scaled for `cosine`."""
    points = torch.nn.functional.normalize(keys.double(), dim=-1) if metric == "cosine" else keys.double()
    member = torch.nn.functional.one_hot(labels.long()).double()
    means = member.mT @ points / member.sum(dim=2).clamp(min=1)[..., None]
    return (points - member @ means).square().sum(dim=(2, 3))


def check(call: Call, expected: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and counts are the twin's; centroids to the rounding of their dtype."""
    centroids, labels, counts = longctx.kmeans(**call)
    exact, exact_labels, exact_counts = expected or longctx.reference.kmeans(**call)
    assert torch.equal(labels, exact_labels)
    assert torch.equal(counts, exact_counts)
    torch.testing.assert_close(centroids, exact)
    record("kmeans", centroids.dtype, centroids.shape[3])
    return centroids, labels, counts


@functools.cache
def with_twin(
    metric: str, num_clusters: int, dtype: torch.dtype, dim: int
) -> tuple[Call, tuple[Tensor, Tensor, Tensor]]:
    """A call and what the twin makes of it, once for all instruction sets."""
    keys = randn(1, 2, 60, dim, dtype=dtype, seed=num_clusters)
    call = {"keys": keys, "num_clusters": num_clusters, "metric": metric, "num_iters": 3, "seed": dim}
    return call, longctx.reference.kmeans(**call)


@pytest.mark.sanitize
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_clusters", [1, 31, 33, 70])
def test_equal_to_the_twin(isa: str, metric: str, num_clusters: int) -> None:
    """Without near ties the steps decide, not the rounding; around the widths of panels, and past the points."""
    for dtype in WIDE:
        check(*with_twin(metric, num_clusters, dtype, 16 if dtype == torch.float64 else 7))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_clusters_are_found(dtype: torch.dtype, metric: str) -> None:
    keys, of = planted(dtype, each=8)
    _, labels, _ = check({"keys": keys, "num_clusters": 18, "metric": metric, "num_iters": 3})
    merged = (labels[..., None] == labels[..., None, :]) & (of[:, None] != of)
    assert not merged.any()


@pytest.mark.sanitize
def test_options(isa: str) -> None:
    for dtype in WIDE:
        check(CASES["kmeans"].calls["all_options"](dtype))


def test_centroids_are_means_of_keys_as_given() -> None:
    """The cosine metric compares directions alone; what it returns has the keys' lengths."""
    keys, _ = planted(WIDE[0])
    scale = torch.exp2(torch.randint(-3, 4, keys.shape[:3], generator=generator(5)).to(WIDE[0]))[..., None]
    _, labels, _ = longctx.kmeans(keys, 9)
    centroids, scaled_labels, counts = longctx.kmeans(keys * scale, 9)
    assert torch.equal(scaled_labels, labels)
    member = torch.nn.functional.one_hot(labels.long(), 9).to(keys)
    torch.testing.assert_close(centroids, member.mT @ (keys * scale) / counts[..., None])


@pytest.mark.parametrize("metric", METRICS)
def test_more_iterations_are_no_worse(metric: str) -> None:
    keys = randn(2, 1, 300, 12, dtype=WIDE[0], seed=3)
    runs = [longctx.kmeans(keys, 20, num_iters=i, metric=metric) for i in (0, 1, 3, 8, 60, 61)]
    sums = [inertia(keys, labels, metric) for _, labels, _ in runs]
    for later, earlier in zip(sums[1:], sums, strict=False):
        assert (later <= earlier * (1 + 4096 * torch.finfo(keys.dtype).eps)).all()
    assert_same_bits(runs[-1], runs[-2])  # it has come to rest


@pytest.mark.parametrize("metric", METRICS)
def test_seeds_are_better_than_random_keys(metric: str) -> None:
    """What the rounds of k-means++ are for: unequal clusters, most keys in one of them."""
    keys, _ = planted(torch.float32, clusters=40, each=12)
    crowd = keys[:, :, :1] + 0.1 * randn(2, 2, 1500, 24, seed=6)
    keys = torch.cat([keys, crowd], dim=2)
    _, labels, _ = longctx.kmeans(keys, 60, num_iters=0, metric=metric)
    points = torch.nn.functional.normalize(keys, dim=-1) if metric == "cosine" else keys
    random = points[:, :, torch.randperm(keys.shape[2], generator=generator(7))[:60]]
    of_random = torch.cdist(points, random).argmin(dim=-1)
    assert (inertia(keys, labels, metric) < 0.2 * inertia(keys, of_random, metric)).all()


def test_ties_go_to_the_lowest_cluster() -> None:
    """Equal keys share a cluster, whatever their number; the other clusters stay empty."""
    for dtype in DTYPES:
        keys = torch.full((1, 1, 40, 16), 0.75, dtype=dtype)
        centroids, labels, counts = check({"keys": keys, "num_clusters": 35, "metric": "euclidean", "num_iters": 2})
        assert not labels.any()
        assert counts[0, 0, 0] == 40
        assert torch.equal(centroids[0, 0, 0], keys[0, 0, 0])
        assert not centroids[0, 0, 1:].any()


def test_fewer_different_keys_than_clusters() -> None:
    keys = randn(1, 1, 6, 8, dtype=WIDE[0], seed=8)[:, :, torch.arange(60) % 6]
    centroids, _, counts = check({"keys": keys, "num_clusters": 12})
    assert (counts > 0).sum() == 6
    sums = (centroids[counts > 0].sum(dim=-1), keys[0, 0, :6].sum(dim=-1))
    torch.testing.assert_close(*(x.sort().values for x in sums))


def test_empty_clusters_take_the_farthest_points() -> None:
    """One iteration after seeds of which some are equal: no cluster is empty while points differ."""
    keys = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 5.0, 6.0]).view(1, 1, 9, 1)
    for seed in range(8):
        _, labels, counts = check({"keys": keys, "num_clusters": 4, "metric": "euclidean", "seed": seed})
        assert (counts > 0).all()
        assert labels[0, 0, :6].unique().numel() == 1


def test_no_keys() -> None:
    for keys, lengths in ((randn(2, 1, 0, 4, seed=0), None), (randn(2, 1, 5, 4, seed=0), int32([0], [0]))):
        centroids, labels, counts = longctx.kmeans(keys, 3, lengths=lengths)
        assert not centroids.any()
        assert not counts.any()
        assert (labels == -1).all()


def test_keys_of_zeros() -> None:
    """They have no direction: equally far from every unit vector, and so with whichever centroid is shortest."""
    keys = randn(1, 1, 20, 8, dtype=WIDE[0], seed=9)
    keys[:, :, ::3] = 0.0
    _, labels, _ = check({"keys": keys, "num_clusters": 4})
    assert labels[0, 0, ::3].unique().numel() == 1


def test_lengths_equal_shorter_keys(isa: str) -> None:
    """To the bit, whatever stands behind them."""
    keys = randn(2, 2, 300, 16, seed=10)
    for length in (1, 40, 299):
        hidden = keys.clone()
        hidden[:, :, length:] = torch.nan
        centroids, labels, counts = longctx.kmeans(hidden, 20, lengths=torch.full((2, 2), length, dtype=torch.int32))
        short_centroids, short_labels, short_counts = longctx.kmeans(keys[:, :, :length].contiguous(), 20)
        assert_same_bits((centroids, labels[:, :, :length], counts), (short_centroids, short_labels, short_counts))
        assert (labels[:, :, length:] == -1).all()


def test_levels_are_compositions() -> None:
    """A centroid that stands for its keys: coarse centroids are the means of all keys below them."""
    keys = randn(1, 2, 800, 16, dtype=WIDE[0], seed=11)
    centroids, labels, counts = longctx.kmeans(keys, 90)
    coarse, coarse_labels, coarse_counts = longctx.kmeans(centroids, 10, counts=counts)
    of_keys = coarse_labels.gather(2, labels.long())
    assert (coarse_counts.sum(dim=2) == 800).all()
    for h in range(2):
        for c in range(10):
            members = of_keys[0, h] == c
            assert members.sum() == coarse_counts[0, h, c]
            torch.testing.assert_close(coarse[0, h, c], keys[0, h, members].mean(dim=0))


def test_heads_and_batch_entries_do_not_mix(isa: str) -> None:
    keys = randn(2, 3, 400, 16, seed=12)
    together = longctx.kmeans(keys, 24)
    for b in range(2):
        for h in range(3):
            alone = longctx.kmeans(keys[b : b + 1, h : h + 1], 24)
            assert_same_bits(tuple(x[b : b + 1, h : h + 1] for x in together), alone)


@pytest.mark.runs_on("cpu", "cuda", reason="fibers take turns in a fixed order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    keys = randn(1, 2, 1500, 20, dtype=dtype, seed=13)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(longctx.kmeans(keys, 100, num_iters=3))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("options", [{"seed": 1}, {"num_iters": 0}], ids=str)
def test_options_that_change_the_draw(options: dict[str, Any]) -> None:
    keys = randn(1, 1, 500, 16, seed=14)
    assert not torch.equal(longctx.kmeans(keys, 30)[1], longctx.kmeans(keys, 30, **options)[1])


def digest() -> str:
    """Of clusters with more members than a run, more centroids than a panel, and rows of both kinds of tiles."""
    found = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for metric, n, dim, num_clusters in (("cosine", 400, 24, 9), ("euclidean", 300, 130, 140)):
            keys = randn(1, 1, n, dim, dtype=dtype, seed=n)
            for output in longctx.kmeans(keys, num_clusters, num_iters=4, metric=metric):  # type: ignore[arg-type]
                found.update(output.view(torch.uint8).numpy())
    return found.hexdigest()


@pytest.mark.runs_on("simt", reason="compares with the CPU's kernels, in another process")
def test_the_bits_of_the_cpu() -> None:
    """Where it multiplies and adds in one step; near ties are what another rounding would decide otherwise."""
    if "avx2" not in available_isas():
        pytest.skip("this machine has no avx2")
    code = "from test_kmeans import *; print(digest())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest()


@pytest.mark.runs_on("simt", reason="counts launches, which fibers do")
def test_launches_follow_from_shapes() -> None:
    """Whatever the keys: a graph that was captured with some is right for others."""
    for num_clusters, rounds in ((3, 3), (40, 18)):  # 18 of 40 that might be needed; one more launch has the rest
        for keys in (randn(1, 1, 60, 8, seed=15), torch.ones(1, 1, 60, 8)):
            before = torch.ops.longctx_simt.num_launches()
            longctx.kmeans(keys, num_clusters, num_iters=4)
            after = torch.ops.longctx_simt.num_launches()
            assert after - before == 2 + 2 * rounds + (rounds < num_clusters) + 3 * 4 + 2
