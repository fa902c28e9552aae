"""`gather_attention`: tokens that are a tree or share their entries, and what it returns besides `(out, lse)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_equal_to_rounding, check_attention, in_float64
from op_case import DTYPES, Call, int32, randn
from topk_cases import gathered, gathered_tree, rope_table

SHARED: dict[str, Call] = {
    "listed": {},
    "forced": {"num_first": 4, "num_last": 9},
    "all forced": {"num_first": 100, "num_last": 100},
    "first keys reach the tokens": {"num_first": 73, "num_last": 1},
    "static cache": {"seqused_k": int32(75, 7), "num_first": 3, "num_last": 2},
    "shorter than the tokens": {"seqused_k": int32(3, 0), "num_first": 1, "num_last": 1},
    "positions": {"rope_cos_sin": rope_table(75, 16), "num_last": 9},
    "the same position": {
        "rope_cos_sin": rope_table(75, 16),
        "q_positions": torch.full((2, 5), 40).int(),
        "num_last": 9,
    },
    "a token without a position": {"rope_cos_sin": rope_table(74, 16), "num_first": 5},
}
OUTPUTS = {"return_key_mass": True, "return_block_states": True}


def plain(call: Call) -> Call:
    return {name: value for name, value in call.items() if name not in OUTPUTS}


def tree_of(*parents: int) -> Tensor:
    """bool [1, tokens, tokens]: each token sees itself and what its parent sees."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        mask[i] |= mask[parent]
    return mask[None]


@pytest.mark.parametrize("tree", [None, tree_of(0, 0, 1, 1, 2)], ids=["chain", "tree"])
@pytest.mark.parametrize("block_size_k", [1, 8])
@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED)
def test_tokens_share_entries(options: Call, block_size_k: int, tree: Tensor | None) -> None:
    """One row of indices for all tokens is one pass, and as good as a copy for each."""
    call = gathered(torch.float32, seqlen_q=5, num_q_heads=6, block_size_k=block_size_k, num_entries=60) | options
    call["tree_mask"] = tree
    one = call["indices"][:, :, :1].contiguous()
    shared = check_attention("gather_attention", call | {"indices": one})
    copied = longctx.gather_attention(**call | {"indices": one.expand(2, 2, 5, 60).contiguous()})
    assert_equal_to_rounding(shared, copied)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
def test_tree(isa: str, dtype: torch.dtype) -> None:
    check_attention("gather_attention", plain(gathered_tree(dtype)))


def test_tokens_of_a_tree_see_their_branch(isa: str) -> None:
    """As if it alone had been appended, at its own positions."""
    call = gathered(torch.float32, batch=1, seqlen_q=5, seqlen_k=45, num_entries=0, head_dim=32)
    tree, table = tree_of(0, 0, 1, 1, 0), rope_table(45, 32)
    depth = tree[0].sum(dim=-1).int()
    out, lse = longctx.gather_attention(
        **call, tree_mask=tree, num_last=45, q_positions=39 + depth[None], rope_cos_sin=table
    )
    for i in range(5):
        keys = torch.cat([torch.arange(40), 40 + tree[0, i].nonzero()[:, 0]])
        branch = {name: call[name][:, :, keys] for name in ("k", "v")} | {"q": call["q"][:, :, [i]]}
        alone = longctx.gather_attention(
            **branch, indices=torch.empty(1, 1, 1, 0).int(), num_last=45, rope_cos_sin=table
        )
        assert_equal_to_rounding((out[:, :, [i]], lse[:, :, [i]]), alone)


def results(call: Call, **options: Any) -> tuple[Tensor, ...]:
    """Of a call with every output, each compared with the twin's."""
    call = call | OUTPUTS | options
    actual = longctx.gather_attention(**call)
    expected = longctx.reference.gather_attention(**in_float64(call))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    for a, b in zip(actual, expected, strict=True):
        atol = tolerance[a.dtype] if a.dtype != torch.float32 else 1e-5 * max(1, call["q"].shape[1])
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)
    return actual


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masses_and_states(isa: str, dtype: torch.dtype) -> None:
    call = gathered(dtype, batch=1, block_size_k=8, num_entries=4)
    results(call, num_first=3, num_last=9, softcap=2.0)


def test_masses_and_states_of_a_tree() -> None:
    results(gathered_tree(torch.float32))


@pytest.mark.parametrize("index_heads", [1, 3, 6])
@pytest.mark.parametrize("tokens", [1, 2])
def test_mass_is_summed_over_who_shares_the_entry(isa: str, index_heads: int, tokens: int) -> None:
    sizes = {"batch": 1, "num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 2, "num_entries": 5}
    call = gathered(torch.float32, index_heads=index_heads, **sizes)
    call["indices"] = call["indices"][:, :, :tokens].contiguous()
    mass = results(call, num_last=2)[2]
    assert mass.shape == (1, index_heads, tokens, 6)
    rows = torch.full(mass.shape[:3], 12.0 / index_heads / tokens)
    torch.testing.assert_close(mass.sum(dim=-1), rows)


@pytest.mark.parametrize("block_size_k", [1, 5, 700])
def test_mass_of_many_segments(isa: str, block_size_k: int) -> None:
    """Entries that lie in two of them, and forced keys that lie in several."""
    sizes = {"batch": 1, "seqlen_q": 1, "seqlen_k": 4000, "num_entries": 1500 // block_size_k + 1}
    call = gathered(torch.float32, block_size_k=block_size_k, **sizes) | {"num_last": 1200}
    out, lse, mass = longctx.gather_attention(**call, return_key_mass=True)
    twin = longctx.reference.gather_attention(**call)
    assert_equal_to_rounding((out, lse), twin)
    scores = (call["q"].unflatten(1, (2, 2)) @ call["k"].unsqueeze(2).transpose(3, 4)).flatten(1, 2) / 4
    probabilities = (scores[:, :, 0] - lse).exp().unflatten(1, (2, 2)).sum(dim=2)  # [1, 2, keys]
    torch.testing.assert_close(mass[:, :, 0, -1], probabilities[..., 2800:].sum(dim=-1))
    for h in range(2):
        for e, entry in enumerate(call["indices"][0, h, 0].tolist()):
            keys = slice(entry * block_size_k, min(2800, (entry + 1) * block_size_k)) if entry >= 0 else slice(0, 0)
            torch.testing.assert_close(mass[0, h, 0, e], probabilities[0, h, keys].sum(), rtol=1e-4, atol=1e-6)


def test_mass_of_unlikely_keys(isa: str) -> None:
    """Far apart logits: later keys raise the reference that earlier weights are relative to."""
    call = gathered(torch.float32, batch=1, num_q_heads=1, num_kv_heads=1, seqlen_q=1, seqlen_k=600, index_heads=1)
    call["indices"] = torch.arange(600, dtype=torch.int32).view(1, 1, 1, 600)
    mass = longctx.gather_attention(**call, softmax_scale=5.0, return_key_mass=True)[2]
    expected = torch.softmax(5.0 * (call["k"] @ call["q"].transpose(2, 3)).double(), dim=2)[0, 0, :, 0].float()
    torch.testing.assert_close(mass[0, 0, 0, :600], expected, rtol=1e-3, atol=1e-9)


def test_states_merge_to_the_result(isa: str) -> None:
    call = gathered(torch.float32, seqlen_q=2, block_size_k=16, num_entries=4, head_dim=32) | {"num_last": 20}
    out, lse, block_out, block_lse = longctx.gather_attention(**call, return_block_states=True)
    assert_equal_to_rounding(longctx.merge_states(block_out, block_lse), (out, lse))


def test_grouped_softmax_of_landmarks(isa: str) -> None:
    """Landmark Attention: softmax over the current section and the landmarks, then inside each block."""
    call = gathered(torch.float32, batch=1, num_q_heads=2, seqlen_q=1, seqlen_k=60, block_size_k=8, head_dim=32)
    call["indices"] = int32(1, 4, 5).view(1, 1, 1, 3)
    landmarks = randn(3, 1, 2, 1, seed=9)  # their logits
    _, _, block_out, block_lse = longctx.gather_attention(**call, num_last=6, return_block_states=True)
    out, _ = longctx.merge_states(block_out, block_lse, torch.cat([landmarks, block_lse[3:]]))
    for h in range(2):
        scores = (call["k"][0, h] @ call["q"][0, h, 0]) / 32**0.5
        a = torch.softmax(torch.cat([scores[54:], landmarks[:, 0, h, 0]]), dim=0)
        expected = a[:6] @ call["v"][0, h, 54:]
        for weight, block in zip(a[6:], (1, 4, 5), strict=True):
            keys = slice(8 * block, 8 * block + 8)
            expected = expected + weight * (torch.softmax(scores[keys], dim=0) @ call["v"][0, h, keys])
        torch.testing.assert_close(out[0, h, 0], expected)
