"""BlockTopK against its definition, one row of one head at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longctx.prefill import BlockTopK
from policy_cases import call


def naive_head(q: Tensor, k: Tensor, policy: BlockTopK) -> list[set[int]]:
    """The key blocks of every row; q [seqlen_q, head_dim], k [seqlen_k, head_dim], float64."""
    size, offset = policy.block_size, len(k) - len(q)
    means = [block.mean(0) for block in k.split(size)]
    rows = []
    for first in range(0, len(q), size):
        queries = q[first : first + size]
        visible = (offset + first + len(queries) - 1) // size + 1
        scores = {c: float(queries.mean(0) @ means[c]) for c in range(visible)}
        kept = {c for c in scores if c < policy.num_first_blocks or c >= visible - policy.num_local_blocks}
        others = sorted(set(scores) - kept, key=lambda c: (-scores[c], c))
        rows.append(kept | set(others[: policy.top_k]))
    return rows


@pytest.mark.parametrize("shape", [(2, 160, 160), (1, 150, 150), (2, 70, 166), (1, 9, 130)])
@pytest.mark.parametrize(
    "policy",
    [
        BlockTopK(block_size=16, top_k=2),
        BlockTopK(block_size=16, top_k=1, num_first_blocks=2, num_local_blocks=3),
        BlockTopK(block_size=16, top_k=4, num_first_blocks=0, num_local_blocks=0),
        BlockTopK(block_size=32, top_k=0),
        BlockTopK(),
    ],
    ids=["small", "wide", "free", "forced", "default"],
)
def test_blocks_are_the_best(shape: tuple[int, int, int], policy: BlockTopK) -> None:
    case = call(*shape, seed=6)
    tiles = policy.select(case.q, case.k, case.context).to_tiles()
    for b in range(shape[0]):
        for head in range(4):
            rows = naive_head(case.q[b, head].double(), case.k[b, head // 2].double(), policy)
            assert [set(row.nonzero()[:, 0].tolist()) for row in tiles[b, head]] == rows


def test_a_lone_token_is_averaged_away() -> None:
    """Why the method may fail: a block of one strong key loses against blocks of many weak ones."""
    k = torch.zeros(1, 1, 256, 16)
    k[:, :, 100, 0] = 16.0
    k[:, :, 128:192, 0] = 2.0
    q = torch.zeros(1, 1, 256, 16)
    q[..., 0] = 4.0
    tiles = BlockTopK(block_size=64, top_k=1).select(q, k, call(1, 1, 1).context).to_tiles()[0, 0]
    assert tiles[3].tolist() == [True, False, True, True]
