"""FlexPrefill against its paper, one head and one tile at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import longctx
from longctx.prefill import AttentionContext, FlexPrefill
from longctx.prefill.flexprefill import jensen_shannon_distance, keep_mass
from longctx.prefill.probe import normalized
from op_case import randn
from policy_cases import CALLS, Call, call

Tiles = set[tuple[int, int]]


def fewest(mass: dict[int, float], gamma: float, at_least: int) -> set[int]:
    """Largest first, until the share `gamma` of the whole is reached."""
    total, reached = sum(mass.values()), 0.0
    kept: set[int] = set()
    for index in sorted(mass, key=lambda i: (-mass[i], i)):
        if len(kept) >= at_least and reached >= gamma * total:
            break
        kept.add(index)
        reached += mass[index]
    return kept


def naive_head(q: Tensor, k: Tensor, policy: FlexPrefill) -> tuple[str, Tiles]:
    """The kind of one head and its tiles; q [seqlen_q, head_dim], k [seqlen_k, head_dim], float64."""
    size, len_q, len_k = policy.block_size, len(q), len(k)
    offset, scale = len_k - len_q, q.shape[1] ** -0.5
    block_of = [j // size for j in range(len_k)]
    num_blocks = block_of[-1] + 1
    probe = range(max(0, len_q - size), len_q)

    vertical = dict.fromkeys(range(num_blocks), 0.0)
    slash = dict.fromkeys(range(num_blocks), 0.0)
    for i in probe:
        weights = torch.softmax(scale * (k[: i + offset + 1] @ q[i]), 0).tolist()
        for j, weight in enumerate(weights):
            vertical[block_of[j]] += weight
            slash[(i + offset - j) // size] += weight

    # Algorithm 1: attention of the pooled query to pooled keys against the pooled attention.
    means = torch.stack([block.mean(0) for block in k.split(size)])
    pooled = torch.softmax(scale * (means @ q[probe.start :].mean(0)), 0).tolist()
    divergence = 0.0
    for c in range(num_blocks):
        a, b = pooled[c], vertical[c] / len(probe)
        middle = (a + b) / 2
        divergence += sum(p / 2 * math.log(p / middle) for p in (a, b) if p > 0)
    kind = "query-aware" if math.sqrt(max(divergence, 0.0)) < policy.tau else "vertical-slash"

    # Algorithm 2; a query-aware head keeps the minimal budget of it.
    gamma = policy.gamma if kind == "vertical-slash" else 0.0
    min_blocks = -(-policy.min_budget // size)
    columns = fewest(vertical, gamma, min_blocks) | {0}
    diagonals = fewest(slash, gamma, min_blocks) | {0}
    tiles = set()
    for i in range(-(-len_q // size) * size):  # a short last block counts as a whole one
        for j in range(min(i + offset + 1, len_k)):
            if block_of[j] in columns or (i + offset - j) // size in diagonals:
                tiles.add((i // size, block_of[j]))

    # Algorithm 3: the map of block means, cut once for the whole head.
    if kind == "query-aware":
        scores = {}
        for row, queries in enumerate(q.split(size)):
            last_key = min(offset + (row + 1) * size, len_k) - 1
            seen = last_key // size + 1
            for c, weight in enumerate(torch.softmax(scale * (means[:seen] @ queries.mean(0)), 0).tolist()):
                scores[row * num_blocks + c] = weight
        tiles |= {divmod(index, num_blocks) for index in fewest(scores, policy.gamma, 0)}
    return kind, tiles


def tiles_of(case: Call, policy: FlexPrefill) -> Tensor:
    return policy.select(case.q, case.k, case.context).to_tiles()


KINDS = {
    "vertical_slash": FlexPrefill(block_size=16, min_budget=0, gamma=0.7, tau=0.0),
    "query_aware": FlexPrefill(block_size=16, min_budget=0, gamma=0.7, tau=2.0),
    "min_budget": FlexPrefill(block_size=16, min_budget=40, gamma=0.3, tau=0.13),
    "mixed": FlexPrefill(block_size=32, min_budget=0, gamma=0.6, tau=0.1),
    "large_blocks": FlexPrefill(block_size=64, min_budget=0, gamma=0.5, tau=0.0),
    "default_size": FlexPrefill(block_size=128, min_budget=128, gamma=0.4),
}
SHAPES = {
    "odd": (2, 190, 190),
    "aligned": (1, 192, 192),
    "chunk": (2, 70, 215),
    "aligned_chunk": (1, 64, 192),
    "few": (1, 9, 130),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_those_of_the_paper(kind: str, shape: str) -> None:
    case, policy = call(*SHAPES[shape], seed=3), KINDS[kind]
    tiles = tiles_of(case, policy)
    for b in range(case.q.shape[0]):
        for head in range(4):
            _, expected = naive_head(case.q[b, head].double(), case.k[b, head // 2].double(), policy)
            assert {(i, c) for i, c in tiles[b, head].nonzero().tolist()} == expected


def test_heads_of_one_call_differ_in_kind() -> None:
    case, policy = call(*SHAPES["odd"], seed=3), KINDS["mixed"]
    kinds = {
        naive_head(case.q[b, h].double(), case.k[b, h // 2].double(), policy)[0] for b in range(2) for h in range(4)
    }
    assert kinds == {"query-aware", "vertical-slash"}


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["batch", "chunk", "aligned"])
def test_vertical_slash_keeps_gamma_of_the_last_queries(kind: str, gamma: float) -> None:
    case = CALLS[kind]
    policy = FlexPrefill(block_size=16, min_budget=0, gamma=gamma, tau=0.0)
    kept = longctx.coverage(case.q, case.k, policy)[:, :, -16:].mean(-1)
    assert bool((kept >= gamma - 1e-6).all())
    assert bool((kept < 1.0).any()) or gamma > 0.5


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_query_aware_keeps_gamma_of_the_map(gamma: float) -> None:
    case = CALLS["batch"]
    policy = FlexPrefill(block_size=16, min_budget=0, gamma=gamma, tau=2.0)
    scores = longctx.block_scores(case.q, case.k, 16, 16)
    kept = (scores * tiles_of(case, policy)).sum((2, 3)) / scores.sum((2, 3))
    assert bool((kept >= gamma - 1e-6).all())


@pytest.mark.parametrize("distance", [1, 40, 64, 77])
@pytest.mark.parametrize("shape", [(1, 600, 600), (1, 240, 607)])
def test_a_slash_between_two_diagonals_is_covered(shape: tuple[int, int, int], distance: int) -> None:
    """Every query attends to the key `distance` before it: all rows keep it, though blocks cross the diagonal."""
    _, len_q, len_k = shape
    k = torch.nn.functional.normalize(randn(1, 1, len_k, 64, seed=1), dim=-1)
    position = torch.arange(len_q) + len_k - len_q
    q = 200.0 * k[:, :, (position - distance).clamp(min=0)]
    policy = FlexPrefill(block_size=32, min_budget=0, gamma=0.9, tau=0.0)
    assert float(longctx.coverage(q, k, policy).min()) > 0.99
    assert float(policy.select(q, k, AttentionContext()).density()) < 0.5


def test_a_vertical_line_is_covered() -> None:
    """All queries attend to one key in the middle: its block and the forced ones are enough."""
    k = torch.nn.functional.normalize(randn(1, 1, 512, 64, seed=2), dim=-1)
    q = 200.0 * k[:, :, 100:101].expand(-1, -1, 512, -1).contiguous()
    policy = FlexPrefill(block_size=32, min_budget=0, gamma=0.9, tau=0.0)
    assert float(longctx.coverage(q, k, policy)[:, :, 100:].min()) > 0.99
    tiles = policy.select(q, k, AttentionContext()).to_tiles()[0, 0]
    assert bool(tiles[4:, 3].all())
    assert bool(tiles[:, 0].all())
    assert float(tiles.sum()) < 0.5 * 16 * 17 / 2


def test_distance_of_distributions_with_zeros() -> None:
    """0 log 0 is 0: no NaN sends a head to the wrong branch."""
    one_hot, other = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    assert float(jensen_shannon_distance(one_hot, one_hot)) == 0.0
    assert float(jensen_shannon_distance(one_hot, other)) == pytest.approx(math.sqrt(math.log(2.0)))
    p, q = (torch.softmax(randn(5, 7, seed=s), -1) for s in (1, 2))
    middle = (p + q) / 2
    expected = (((p * (p / middle).log()) + q * (q / middle).log()).sum(-1) / 2).sqrt()
    torch.testing.assert_close(jensen_shannon_distance(p, q), expected)


def test_sharp_attention_is_query_aware() -> None:
    """A head whose scores underflow everywhere but in one block: both distributions are the same one-hot."""
    k = torch.zeros(1, 1, 256, 16)
    k[:, :, 64:128, 0] = 100.0
    q = torch.zeros(1, 1, 256, 16)
    q[..., 0] = 100.0
    policy = FlexPrefill(block_size=64, min_budget=0, gamma=0.9, tau=0.1)
    assert naive_head(q[0, 0].double(), k[0, 0].double(), policy)[0] == "query-aware"
    _, expected = naive_head(q[0, 0].double(), k[0, 0].double(), policy)
    tiles = policy.select(q, k, AttentionContext()).to_tiles()[0, 0]
    assert {(i, c) for i, c in tiles.nonzero().tolist()} == expected


def test_crossing_entry_is_kept() -> None:
    mass = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mass = mass.double()
    kept = keep_mass(mass, torch.full((4, 1), 0.5), 0).int().tolist()
    assert kept == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert keep_mass(mass, torch.zeros(4, 1), 2).int().tolist()[0] == [0, 1, 1, 0]
    assert keep_mass(mass, torch.ones(4, 1), 0).int().sum(-1).tolist() == [4, 4, 1, 0]
    assert normalized(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_padding_on_the_right_is_no_query() -> None:
    """The last real queries decide, not the padding behind them."""
    case, policy = CALLS["right_padded"], FlexPrefill(block_size=16, min_budget=0, gamma=0.5, tau=0.0)
    padded = policy.select(case.q, case.k, case.context).to_tiles()
    real = 150 - 37
    alone = policy.select(case.q[1:, :, :real], case.k[1:, :, :real], AttentionContext()).to_tiles()
    rows = alone.shape[2]
    assert torch.equal(padded[1:, :, :rows, :rows], alone)


def test_chunks_with_the_last_queries_agree_with_the_whole() -> None:
    """Vertical-slash heads depend on the last queries alone: a chunk is the tail of the whole."""
    whole = call(1, 192, 192, seed=9)
    policy = FlexPrefill(block_size=32, min_budget=0, gamma=0.6, tau=0.0)
    tail = Call(whole.q[:, :, 96:], whole.k, whole.v)
    assert torch.equal(tiles_of(tail, policy), tiles_of(whole, policy)[:, :, 3:])
