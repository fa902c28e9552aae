"""XAttention against its paper, one row of one head at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import longctx
from longctx.prefill import XAttention
from op_case import randn
from policy_cases import CALLS, call


def naive_head(q: Tensor, k: Tensor, policy: XAttention) -> list[set[int]]:
    """The key blocks of every row; q [seqlen_q, head_dim], k [seqlen_k, head_dim], float64."""
    size, stride = policy.block_size, policy.stride
    offset = len(k) - len(q)
    groups_of_keys = k.split(stride)
    rows = []
    for first in range(0, len(q), size):
        last_position = offset + min(first + size, len(q)) - 1
        own = last_position // size
        mass = dict.fromkeys(range(own + 1), 0.0)
        for n, queries in enumerate(q[first : first + size].split(stride)):
            position = offset + first + n * stride + len(queries) - 1
            scores = []
            for m, keys in enumerate(groups_of_keys):
                if m * stride <= position:
                    pairs = min(len(queries), len(keys))
                    # Query stride - 1 - t of the square meets its key t.
                    dots = [float(queries[len(queries) - 1 - t] @ keys[t]) for t in range(pairs)]
                    scores.append(sum(dots) / pairs * q.shape[1] ** -0.5)
            for m, weight in enumerate(torch.softmax(torch.tensor(scores, dtype=torch.float64), 0).tolist()):
                mass[m * stride // size] += weight
        kept = {0, own}
        reached = sum(mass[c] for c in kept)
        for c in sorted(set(mass) - kept, key=lambda c: (-mass[c], c)):
            if reached >= policy.threshold * sum(mass.values()):
                break
            kept.add(c)
            reached += mass[c]
        rows.append(kept)
    return rows


@pytest.mark.parametrize("shape", [(2, 160, 160), (1, 150, 150), (2, 70, 166), (1, 64, 192)])
@pytest.mark.parametrize(("size", "stride", "threshold"), [(16, 4, 0.5), (32, 8, 0.7), (64, 16, 0.4), (32, 32, 0.9)])
def test_blocks_are_those_of_the_paper(shape: tuple[int, int, int], size: int, stride: int, threshold: float) -> None:
    case, policy = call(*shape, seed=4), XAttention(block_size=size, stride=stride, threshold=threshold)
    tiles = policy.select(case.q, case.k, case.context).to_tiles()
    for b in range(shape[0]):
        for head in range(4):
            rows = naive_head(case.q[b, head].double(), case.k[b, head // 2].double(), policy)
            assert [set(row.nonzero()[:, 0].tolist()) for row in tiles[b, head]] == rows


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_threshold_of_the_estimate_is_reached(threshold: float) -> None:
    case = CALLS["batch"]
    policy = XAttention(block_size=16, stride=4, threshold=threshold)
    scores = longctx.block_scores(case.q, case.k, 16, 16, method="antidiagonal", stride=4)
    kept = (scores * policy.select(case.q, case.k, case.context).to_tiles()).sum(-1)
    assert bool((kept >= threshold - 1e-5).all())


def test_a_higher_threshold_keeps_more() -> None:
    case = CALLS["batch"]
    tiles = [
        XAttention(block_size=16, stride=4, threshold=t).select(case.q, case.k, case.context).to_tiles()
        for t in (0.3, 0.6, 0.9, 1.0)
    ]
    for fewer, more in itertools.pairwise(tiles):
        assert not bool((fewer & ~more).any())
    assert tiles[0].sum() < tiles[-1].sum()


def test_a_slash_is_found() -> None:
    """Every antidiagonal crosses a line of queries that attend a fixed distance back."""
    k = torch.nn.functional.normalize(randn(1, 1, 512, 64, seed=1), dim=-1)
    q = 300.0 * k[:, :, (torch.arange(512) - 150).clamp(min=0)]
    policy = XAttention(block_size=32, stride=8, threshold=0.9)
    assert float(longctx.coverage(q, k, policy).mean()) > 0.95
