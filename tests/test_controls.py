"""The controls: random blocks know nothing, oracle blocks know everything, at the same density."""

from __future__ import annotations

import pytest
import torch

import longctx
from longctx.prefill import AttentionContext, BlockTopK, OracleBlocks, Policy, RandomBlocks, XAttention
from longctx.prefill.controls import block_masses
from op_case import int32
from policy_cases import CALLS, Call, call


def visible_counts(case: Call, size: int) -> torch.Tensor:
    """Visible key blocks of every row of an unpacked causal call."""
    last = torch.arange(size, case.q.shape[2] + size, size).clamp(max=case.q.shape[2])
    return (last + case.k.shape[2] - case.q.shape[2] - 1) // size + 1


@pytest.mark.parametrize("density", [0.1, 0.34, 0.5, 1.0])
@pytest.mark.parametrize("control", [RandomBlocks, OracleBlocks])
@pytest.mark.parametrize("kind", ["batch", "chunk", "aligned"])
def test_density_of_every_row(kind: str, control: type[Policy], density: float) -> None:
    case = CALLS[kind]
    tiles = control(density=density, block_size=16).select(case.q, case.k, case.context).to_tiles()
    visible = visible_counts(case, 16)
    at_least = visible.clamp(max=2 if control is RandomBlocks else 1)
    expected = torch.maximum((density * visible).round(), at_least.float()).long()
    assert torch.equal(tiles.sum(-1), expected.expand(*tiles.shape[:3]))


@pytest.mark.parametrize("kind", ["batch", "chunk", "packed", "seqused", "right_padded", "documents", "capped"])
def test_masses_are_exact(kind: str) -> None:
    case, size = CALLS[kind], 16
    context = case.context
    scale = 16**-0.5 if context.softmax_scale is None else context.softmax_scale
    scores = scale * case.q.double() @ case.k.double().repeat_interleave(2, 1).mT
    if context.softcap:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    mask = longctx.Pattern.of(case.q, case.k, context).to_mask()
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.0)
    actual = block_masses(case.q, case.k, context, size).double()
    cu_q = [0, case.q.shape[2]] if context.cu_seqlens_q is None else context.cu_seqlens_q.tolist()
    cu_k = [0, case.k.shape[2]] if context.cu_seqlens_k is None else context.cu_seqlens_k.tolist()
    row = 0
    for s in range(len(cu_q) - 1):
        own = weights[:, :, cu_q[s] : cu_q[s + 1], cu_k[s] : cu_k[s + 1]]
        for queries in own.split(size, 2) if own.shape[2] else ():
            expected = torch.stack([block.sum((2, 3)) for block in queries.split(size, 3)], -1)
            torch.testing.assert_close(actual[:, :, row, : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
            row += 1


def test_oracle_is_the_best_of_its_density() -> None:
    """No other choice of as many blocks keeps more of any row, and no policy of that density keeps more overall."""
    case = call(1, 160, 160, seed=11)
    for density in (0.15, 0.3, 0.6):
        oracle = OracleBlocks(density=density, block_size=16)
        best = longctx.coverage(case.q, case.k, oracle).unflatten(2, (10, 16)).mean(-1)
        for seed in range(5):
            other = RandomBlocks(density=density, block_size=16, seed=seed)
            kept = longctx.coverage(case.q, case.k, other).unflatten(2, (10, 16)).mean(-1)
            equal_count = oracle.select(case.q, case.k, case.context).to_tiles().sum(-1) == other.select(
                case.q, case.k, case.context
            ).to_tiles().sum(-1)
            assert bool((kept <= best + 1e-6)[equal_count].all())
    for policy in (BlockTopK(block_size=16, top_k=1), XAttention(block_size=16, stride=4, threshold=0.4)):
        density = float(policy.select(case.q, case.k, case.context).density())
        oracle = OracleBlocks(density=density, block_size=16)
        kept, best = (longctx.coverage(case.q, case.k, p).mean() for p in (policy, oracle))
        assert kept < best


def test_random_is_deterministic_and_varied() -> None:
    case = CALLS["batch"]
    policy = RandomBlocks(density=0.4, block_size=16, seed=7)
    tiles = policy.select(case.q, case.k, case.context).to_tiles()
    assert torch.equal(tiles, policy.select(case.q, case.k, case.context).to_tiles())
    assert torch.equal(tiles[0], tiles[1]), "the draw does not depend on the place in the batch"
    heads = [tiles[0, h] for h in range(4)]
    assert all(not torch.equal(heads[0], other) for other in heads[1:])
    for other in (
        RandomBlocks(density=0.4, block_size=16, seed=8).select(case.q, case.k, case.context),
        policy.select(case.q, case.k, AttentionContext(layer_idx=2)),
    ):
        assert not torch.equal(other.to_tiles(), tiles)


def test_random_keeps_first_and_own_block() -> None:
    case = CALLS["chunk"]
    tiles = RandomBlocks(density=0.05, block_size=16).select(case.q, case.k, case.context).to_tiles()
    own = visible_counts(case, 16) - 1
    assert bool(tiles[..., 0].all())
    assert bool(tiles.gather(3, own[None, None, :, None].expand(2, 4, -1, 1)).all())


def test_random_is_uniform() -> None:
    """Over many seeds every block of a row is drawn equally often."""
    case = Call(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16 * 22, 16), torch.zeros(1, 1, 16 * 22, 16))
    draws = [
        RandomBlocks(density=0.5, block_size=16, seed=seed)
        .select(case.q, case.k, AttentionContext())
        .to_tiles()[0, 0, 0]
        for seed in range(200)
    ]
    frequency = torch.stack(draws).float().mean(0)
    assert frequency[0] == frequency[-1] == 1.0
    assert bool((frequency[1:-1] - 9 / 20).abs().max() < 0.15)


def test_oracle_refuses_three_ranges() -> None:
    case = CALLS["batch"]
    ranges = torch.zeros(2, 2, 150, 2, dtype=torch.int32) + int32(0, 150)
    context = AttentionContext(window_size_left=20, num_sink_tokens=3, key_ranges=ranges)
    with pytest.raises(ValueError, match="longctx::oracle: a query may see at most 2 ranges of keys; got up to 4"):
        OracleBlocks().select(case.q, case.k, context)
