"""Which calls run dense although a policy is applied: what the policy keeps at least, against counting pairs."""

from __future__ import annotations

import pytest
import torch

from longctx.integrations.transformers import apply, stats
from longctx.prefill import (
    AShape,
    AttentionContext,
    BlockTopK,
    Dense,
    FlexPrefill,
    LMInfinite,
    Policy,
    RandomBlocks,
    XAttention,
)
from longctx.prefill.cost import REASON, Lengths
from op_case import randn
from policy_cases import rope
from transformers_models import tiny, tokens

LENGTHS = [(1, 1), (1, 9), (7, 7), (7, 20), (20, 7), (0, 5), (5, 0)]


@pytest.mark.parametrize("window_size_left", [-1, 0, 3, 100])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_pairs_are_counted(seqlen_q: int, seqlen_k: int, window_size_left: int) -> None:
    lengths = Lengths(seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_size_left=window_size_left)
    window = seqlen_k if window_size_left < 0 else window_size_left + 1
    seen = [min(max(i + 1 + seqlen_k - seqlen_q, 0), window) for i in range(seqlen_q)]
    assert lengths.num_pairs() == sum(seen)
    for kept in (0, 1, 4, 6, 1000):
        assert lengths.num_pairs(kept) == sum(min(n, kept) for n in seen)


def causal(length: int) -> Lengths:
    return Lengths(seqlen_q=length, seqlen_k=length)


@pytest.mark.parametrize(
    ("policy", "dense_to", "sparse_from"),
    [
        (FlexPrefill(), 1967, 1968),
        (AShape(), 7487, 7488),
        (BlockTopK(), 9546, 9547),
        (XAttention(), 400, 401),
        (LMInfinite(), 4096, 4097),
    ],
    ids=lambda value: value.name if isinstance(value, Policy) else str(value),
)
def test_defaults_run_dense_up_to_their_budget(policy: Policy, dense_to: int, sparse_from: int) -> None:
    assert policy.why_dense(causal(dense_to)) == REASON
    assert policy.why_dense(causal(sparse_from)) == ""
    assert policy.why_dense(causal(1 << 17)) == ""
    costs = [policy.least_cost(causal(length)) for length in (64, 1024, 8192, 1 << 17)]
    assert costs == sorted(costs, reverse=True)


def test_controls_run_as_asked() -> None:
    assert RandomBlocks(density=1.0).why_dense(causal(64)) == ""
    assert Dense().why_dense(causal(1 << 17)) == REASON


@pytest.mark.parametrize("length", [64, 300])
@pytest.mark.parametrize(
    "policy",
    [
        AShape(num_sink_tokens=8, window_size=100),
        BlockTopK(block_size=16, top_k=4),
        FlexPrefill(block_size=16, min_budget=64, gamma=0.01),
        XAttention(block_size=16, stride=8, threshold=0.01),
    ],
    ids=lambda policy: policy.name,
)
def test_at_least_that_much_is_kept(policy: Policy, length: int) -> None:
    """Of patterns that keep no more than they must, by counting; FlexPrefill's budget need not be seen by every row."""
    q, k = randn(1, 2, length, 16, seed=0), randn(1, 2, length, 16, seed=1)
    kept = float(policy.select(q, k, AttentionContext()).to_mask().sum()) / 2
    selection = {"flexprefill": causal(length).probed(16), "xattention": 0.5 / 8}.get(policy.name, 0.0)
    predicted = (policy.least_cost(causal(length)) - selection) * causal(length).num_pairs()
    assert predicted <= kept + 16 * length / 2


def test_where_logits_change_dense_is_the_same() -> None:
    policy = LMInfinite(num_global_tokens=4, window_size=40)
    q, k, v = (randn(1, 2, 40, 16, seed=seed) for seed in range(3))
    assert policy.why_dense(causal(40)) == REASON
    for actual, expected in zip(policy(q, k, v, rope=rope), Dense()(q, k, v), strict=True):
        torch.testing.assert_close(actual, expected)
    # Nearly everything near is not everything: the far keys move.
    assert policy.least_cost(causal(41)) > 0.99
    assert policy.why_dense(causal(41)) == ""


def test_stats_say_so() -> None:
    model = apply(tiny("llama"), "ashape:num_sink_tokens=16,window_size=64", min_seqlen_q=16)
    for length, sparse_calls in ((80, 0), (300, 1)):
        with torch.no_grad():
            model(tokens(1, length))
        for layer in stats(model).layers:
            assert (layer.sparse_calls, layer.dense_reasons) == (sparse_calls, {REASON: 1})
    assert f"{REASON} (1)" in str(stats(model))


def test_sliding_layers_have_less_to_save() -> None:
    """Dense attention of a window of 100 keys is cheap; a policy that keeps 100 saves nothing at any length."""
    policy = AShape(num_sink_tokens=0, window_size=100)
    assert policy.why_dense(Lengths(seqlen_q=5000, seqlen_k=5000, window_size_left=99)) == REASON
    assert policy.why_dense(causal(5000)) == ""
