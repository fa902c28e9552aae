"""What holds for every policy: exactness of its pattern, independence of sequences, options and errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

import longctx
from longctx.prefill import (
    AShape,
    AttentionContext,
    BlockTopK,
    Dense,
    FlexPrefill,
    LMInfinite,
    OracleBlocks,
    Pattern,
    PerLayer,
    Policy,
    RandomBlocks,
    XAttention,
    get_policy,
)
from longctx.reference._mask import listed_keys, visible_keys
from longctx.reference.attention import masked_attention
from op_case import DTYPES, int32, randn
from policy_cases import CALLS, FULL, POLICIES, Call, call, left_padded, rope

SPARSE = [name for name in POLICIES if name != "dense"]
BLOCKS = [name for name in SPARSE if name != "ashape"]


def mask_of(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    """The pattern's mask by the definitions of the block list and the predicate, row by row."""
    lengths = {name: getattr(pattern, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
    visible = visible_keys(q.shape[0], q.shape[2], k.shape[2], **pattern.predicate())[:, None]
    if pattern.block_indptr is None or pattern.block_indices is None:
        return visible.expand(-1, q.shape[1], -1, -1)
    sizes = {"batch": q.shape[0], "num_q_heads": q.shape[1], "seqlen_q": q.shape[2], "seqlen_k": k.shape[2]}
    lists = (pattern.block_indptr, pattern.block_indices, pattern.block_size_q, pattern.block_size_k)
    return visible & listed_keys(*lists, **sizes, **lengths)


def dense_mask(case: Call) -> Tensor:
    return mask_of(Pattern.of(case.q, case.k, case.context), case.q, case.k)


def masked(case: Call, mask: Tensor) -> tuple[Tensor, Tensor]:
    context = case.context
    options = {"softmax_scale": context.softmax_scale, "softcap": context.softcap, "sinks": context.sinks}
    return masked_attention(case.q, case.k, case.v, mask, **options)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", POLICIES)
def test_equals_masked_dense(name: str, kind: str) -> None:
    case, policy = CALLS[kind], POLICIES[name]
    pattern = policy.select(case.q, case.k, case.context)
    mask = mask_of(pattern, case.q, case.k)
    assert torch.equal(pattern.to_mask(), mask)
    assert not bool((mask & ~dense_mask(case)).any()), "a policy only narrows what the call shows"
    assert_same(policy.attend(case.q, case.k, case.v, case.context), masked(case, mask))


@pytest.mark.parametrize("name", BLOCKS)
def test_is_sparse_and_sees_itself(name: str) -> None:
    for kind in ("batch", "chunk", "packed", "left_padded"):
        case = CALLS[kind]
        pattern = POLICIES[name].select(case.q, case.k, case.context)
        mask = pattern.to_mask()
        assert mask.sum() < 0.97 * dense_mask(case).sum() * mask.shape[1], kind
        if name != "oracle":
            assert bool((mask.any(-1) == dense_mask(case).any(-1)).all()), kind


@pytest.mark.parametrize(("name", "kind"), [(n, c) for n in FULL for c in CALLS if (n, c) != ("ashape_sinks", "gap")])
def test_everything_kept_equals_dense(name: str, kind: str) -> None:
    case, policy = CALLS[kind], FULL[name]
    assert_same(policy.attend(case.q, case.k, case.v, case.context), masked(case, dense_mask(case)))
    assert float(policy.select(case.q, case.k, case.context).density()) == 1.0


@pytest.mark.parametrize("kind", ["batch", "chunk", "packed", "seqused", "left_padded", "documents", "window"])
@pytest.mark.parametrize("name", POLICIES)
def test_density_counts_tiles(name: str, kind: str) -> None:
    """Against the masks: a tile is visited where the list and any score of it do."""
    case = CALLS[kind]
    pattern = POLICIES[name].select(case.q, case.k, case.context)
    size_q, size_k = pattern.block_size_q, pattern.block_size_k

    def tiles(mask: Tensor) -> int:
        total = 0
        cu_q = [0, mask.shape[2]] if pattern.cu_seqlens_q is None else pattern.cu_seqlens_q.tolist()
        cu_k = [0, mask.shape[3]] if pattern.cu_seqlens_k is None else pattern.cu_seqlens_k.tolist()
        for s in range(len(cu_q) - 1):
            for rows in mask[:, :, cu_q[s] : cu_q[s + 1]].split(size_q, 2):
                for tile in rows[..., cu_k[s] : cu_k[s + 1]].split(size_k, 3):
                    total += int(tile.any(-1).any(-1).sum())
        return total

    dense = tiles(dense_mask(case).expand(-1, case.q.shape[1], -1, -1))
    assert float(pattern.density()) == pytest.approx(tiles(mask_of(pattern, case.q, case.k)) / dense, rel=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_packed_equals_one_by_one(name: str) -> None:
    case, policy = CALLS["packed"], POLICIES[name]
    out, lse = policy.attend(case.q, case.k, case.v, case.context)
    cu_q, cu_k = case.options["cu_seqlens_q"].tolist(), case.options["cu_seqlens_k"].tolist()
    for s in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        if rows.start == rows.stop:
            continue
        alone = policy(case.q[:, :, rows], case.k[:, :, keys], case.v[:, :, keys], layer_idx=1)
        assert_same((out[:, :, rows], lse[:, :, rows]), alone)


@pytest.mark.parametrize("name", POLICIES)
def test_batch_equals_one_by_one(name: str) -> None:
    policy = POLICIES[name]
    for kind in ("batch", "chunk"):
        case = CALLS[kind]
        out, lse = policy(case.q, case.k, case.v, layer_idx=1)
        for b in range(2):
            alone = policy(case.q[b : b + 1], case.k[b : b + 1], case.v[b : b + 1], layer_idx=1)
            assert_same((out[b : b + 1], lse[b : b + 1]), alone)


@pytest.mark.parametrize("name", POLICIES)
def test_static_cache_equals_its_used_part(name: str) -> None:
    case, policy = CALLS["seqused"], POLICIES[name]
    k, v = case.k.clone(), case.v.clone()
    for b, used in enumerate(case.options["seqused_k"].tolist()):
        k[b, :, used:] = float("nan")
        v[b, :, used:] = float("nan")
    out, lse = policy(case.q, k, v, layer_idx=1, **case.options)
    for b, used in enumerate(case.options["seqused_k"].tolist()):
        one = slice(b, b + 1)
        alone = policy(case.q[one], case.k[one, :, :used], case.v[one, :, :used], layer_idx=1)
        assert_same((out[one], lse[one]), alone)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("random", "xattention", "perlayer")])
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    """Padding by whole blocks, so that the blocks of both calls are the same tokens."""
    policy, padded = POLICIES[name], call(1, 160, 160, seed=5)
    ranges = left_padded(1, 160, [32])
    out, lse = policy(padded.q, padded.k, padded.v, layer_idx=1, key_ranges=ranges)
    own = (padded.q[:, :, 32:], padded.k[:, :, 32:], padded.v[:, :, 32:])
    assert_same((out[:, :, 32:], lse[:, :, 32:]), policy(*own, layer_idx=1))
    assert bool((lse[:, :, :32] == -torch.inf).all())


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "oracle"])
def test_sinks_survive_padding(name: str) -> None:
    """The first tokens stay visible to every query, though the first blocks of the axis are padding."""
    case, policy = call(1, 160, 160, seed=5), POLICIES[name]
    context = AttentionContext(layer_idx=1, key_ranges=left_padded(1, 160, [40]))
    assert bool(policy.select(case.q, case.k, context).to_mask()[:, :, 40:, 40].all())


@pytest.mark.parametrize("name", [n for n in POLICIES if not n.startswith("flexprefill") and n != "random"])
def test_chunked_prefill_equals_the_whole(name: str) -> None:
    """A row's pattern depends on no other row, where chunks end at blocks."""
    policy, whole = POLICIES[name], call(2, 150, 150, seed=7)
    out, lse = policy(whole.q, whole.k, whole.v, layer_idx=1)
    for first, last in ((0, 64), (64, 128), (128, 150)):
        rows, keys = slice(first, last), slice(0, last)
        chunk = policy(whole.q[:, :, rows], whole.k[:, :, keys], whole.v[:, :, keys], layer_idx=1)
        assert_same(chunk, (out[:, :, rows], lse[:, :, rows]))


@pytest.mark.parametrize("name", POLICIES)
def test_same_call_same_bits(name: str) -> None:
    case, policy = CALLS["batch"], POLICIES[name]
    first = policy.attend(case.q, case.k, case.v, case.context)
    second = copy.deepcopy(policy).attend(case.q, case.k, case.v, case.context)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", SPARSE)
def test_dtypes(name: str) -> None:
    """Selection runs in the dtype of q; the result is that of the same pattern."""
    case, policy = CALLS["batch"], POLICIES[name]
    for dtype in DTYPES[1:]:
        q, k, v = (t.to(dtype) for t in (case.q, case.k, case.v))
        pattern = policy.select(q, k, case.context)
        out, lse = policy.attend(q, k, v, case.context)
        exact, exact_lse = masked(Call(q, k, v), mask_of(pattern, q, k))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact.double(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=1e-2)


def test_strided_inputs() -> None:
    case = CALLS["batch"]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k, case.v)]
    for policy in POLICIES.values():
        expected = policy.attend(case.q, case.k, case.v, case.context)
        assert_same(policy.attend(*strided, case.context), expected)


# ---- coverage ----


@pytest.mark.parametrize("kind", ["batch", "packed", "left_padded", "capped"])
@pytest.mark.parametrize("name", POLICIES)
def test_coverage_is_the_kept_mass(name: str, kind: str) -> None:
    case = CALLS[kind]
    context = case.context
    dense = dense_mask(case).expand(-1, case.q.shape[1], -1, -1)
    kept = mask_of(POLICIES[name].select(case.q, case.k, context), case.q, case.k)
    k = case.k.double().repeat_interleave(2, 1)
    scores = (16**-0.5 if context.softmax_scale is None else context.softmax_scale) * case.q.double() @ k.mT
    if context.softcap:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    weights = torch.softmax(scores.masked_fill(~dense, -torch.inf), -1).masked_fill(~kept, 0.0)
    expected = torch.where(dense.any(-1), weights.sum(-1), 1.0)
    actual = longctx.coverage(case.q, case.k, POLICIES[name], layer_idx=1, **case.options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_coverage_refuses_other_logits() -> None:
    case = CALLS["batch"]
    with pytest.raises(ValueError, match="longctx::coverage: `policy` must keep the logits"):
        longctx.coverage(case.q, case.k, LMInfinite())
    with pytest.raises(ValueError, match="longctx::coverage: `policy` must keep the logits"):
        longctx.coverage(case.q, case.k, PerLayer({0: LMInfinite()}, default=Dense()), layer_idx=1)


# ---- per layer ----


def test_per_layer_delegates() -> None:
    case = CALLS["batch"]
    other = BlockTopK(block_size=16, top_k=1)
    mixed = PerLayer({0: Dense(), 3: LMInfinite()}, default=other)
    for layer_idx, policy in ((0, Dense()), (1, other), (2, other)):
        expected = policy(case.q, case.k, case.v, layer_idx=layer_idx)
        assert torch.equal(mixed(case.q, case.k, case.v, layer_idx=layer_idx)[0], expected[0])
    assert mixed.policy_of(3) == LMInfinite()
    assert mixed.needs == {"layer_idx", "rope"}
    assert mixed.changes_logits
    assert PerLayer({0: Dense()}, default=other).needs == {"layer_idx"}
    with pytest.raises(ValueError, match="longctx::perlayer: `layer_idx` must be given"):
        mixed(case.q, case.k, case.v)
    with pytest.raises(ValueError, match="longctx::perlayer: `layers` must map layer numbers"):
        PerLayer({-1: Dense()}, default=other)
    with pytest.raises(ValueError, match="longctx::perlayer: `layers` must hold policies"):
        PerLayer({0: "dense"}, default=other)  # type: ignore[dict-item]


# ---- policies as values ----


@pytest.mark.parametrize("policy", [*POLICIES.values(), LMInfinite()], ids=repr)
def test_policies_are_values(policy: Policy) -> None:
    """Models are copied, saved and compared with their policies."""
    assert copy.deepcopy(policy) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(copy.deepcopy(policy)) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.gamma = 1.0  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        type(policy)(1, 2, 3)  # type: ignore[call-arg]


def test_get_policy() -> None:
    assert get_policy("dense") == Dense()
    assert get_policy("flexprefill:gamma=0.9,block_size=64") == FlexPrefill(gamma=0.9, block_size=64)
    assert get_policy("ashape: num_sink_tokens = 4, window_size = 128") == AShape(num_sink_tokens=4, window_size=128)
    assert get_policy("random:density=0.5,seed=3") == RandomBlocks(density=0.5, seed=3)
    policy = XAttention()
    assert get_policy(policy) is policy
    assert get_policy("lminfinite").needs == {"rope"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flexprefil", "`spec` must name one of ashape, blocktopk, dense, flexprefill.*; got 'flexprefil'"),
        ("flexprefill:gama=0.9", r"`spec` must set fields of flexprefill \(gamma, tau, .*got 'gama=0.9'"),
        ("flexprefill:gamma", "as field=value; got 'gamma'"),
        ("dense:x=1", r"\(it has none\)"),
        ("flexprefill:gamma=high", "`flexprefill.gamma` must be float; got 'high'"),
        ("flexprefill:block_size=64.0", "`flexprefill.block_size` must be int; got '64.0'"),
        ("perlayer:default=dense", "`perlayer.default` must be Policy; got 'dense'"),
        ("perlayer", "`spec` must set default, layers of perlayer; got 'perlayer'"),
    ],
)
def test_get_policy_errors(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_policy(spec)


ILLEGAL = [
    (AShape, {"num_sink_tokens": -1}),
    (AShape, {"window_size": 0}),
    (BlockTopK, {"top_k": -1}),
    (BlockTopK, {"block_size": 48}),
    (BlockTopK, {"num_first_blocks": -1}),
    (BlockTopK, {"num_local_blocks": -2}),
    (FlexPrefill, {"gamma": 0.0}),
    (FlexPrefill, {"gamma": 1.01}),
    (FlexPrefill, {"gamma": float("nan")}),
    (FlexPrefill, {"tau": -0.1}),
    (FlexPrefill, {"min_budget": -1}),
    (FlexPrefill, {"block_size": 256}),
    (LMInfinite, {"num_global_tokens": -1}),
    (LMInfinite, {"window_size": 0}),
    (OracleBlocks, {"density": 0.0}),
    (OracleBlocks, {"block_size": 0}),
    (RandomBlocks, {"density": 1.5}),
    (RandomBlocks, {"seed": -1}),
    (XAttention, {"threshold": 0.0}),
    (XAttention, {"stride": 5}),
    (XAttention, {"stride": 32, "block_size": 16}),
]


@pytest.mark.parametrize(("policy", "options"), ILLEGAL, ids=lambda value: getattr(value, "name", str(value)))
def test_illegal_options(policy: type[Policy], options: dict[str, float]) -> None:
    field, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"longctx::{policy.name}: `{field}` must .*; got {value}"):
        policy(**options)


@pytest.mark.parametrize(
    "policy", [FlexPrefill(), AShape(), BlockTopK(), XAttention(), LMInfinite()], ids=lambda p: p.name
)
def test_causal_methods_refuse_other_calls(policy: Policy) -> None:
    case = CALLS["short"]
    with pytest.raises(ValueError, match=f"longctx::{policy.name}: `causal` must be True; got False"):
        policy(case.q, case.k, case.v, causal=False, rope=rope)


@pytest.mark.parametrize("name", ["dense", "random", "oracle"])
def test_bidirectional_calls(name: str) -> None:
    case = CALLS["chunk"].with_(causal=False)
    pattern = POLICIES[name].select(case.q, case.k, case.context)
    mask = mask_of(pattern, case.q, case.k)
    assert bool((mask & ~dense_mask(CALLS["chunk"])).any()), "later keys are seen as well"
    assert_same(POLICIES[name].attend(case.q, case.k, case.v, case.context), masked(case, mask))


def test_a_window_around_sinks_is_refused() -> None:
    case = CALLS["batch"].with_(window_size_left=30, num_sink_tokens=2)
    with pytest.raises(ValueError, match="sinks and a window inside a context"):
        AShape(num_sink_tokens=2, window_size=20).select(case.q, case.k, case.context)


def test_unknown_context_field() -> None:
    with pytest.raises(TypeError, match="window_left"):
        Dense()(randn(1, 1, 4, 16, seed=0), randn(1, 1, 4, 16, seed=1), randn(1, 1, 4, 16, seed=2), window_left=3)


def test_ashape_keeps_sinks_and_window() -> None:
    """By the definition, one query at a time; sinks are the first keys that the query may see."""
    policy = AShape(num_sink_tokens=5, window_size=40)
    for kind in ("batch", "chunk", "seqused", "left_padded", "documents"):
        case = CALLS[kind]
        mask, dense = policy.select(case.q, case.k, case.context).to_mask()[:, 0], dense_mask(case)[:, 0]
        for b in range(mask.shape[0]):
            len_k = case.k.shape[2] if "seqused_k" not in case.options else int(case.options["seqused_k"][b])
            for i in range(mask.shape[1]):
                seen = dense[b, i].nonzero()[:, 0].tolist()
                position = i + len_k - mask.shape[1]
                expected = [j for n, j in enumerate(seen) if n < 5 or position - j < 40]
                assert mask[b, i].nonzero()[:, 0].tolist() == expected


def test_head_offset_is_that_of_tensor_parallelism() -> None:
    """Two processes with two heads each draw what one process with four draws."""
    case, policy = CALLS["batch"], POLICIES["random"]
    whole = policy.select(case.q, case.k, case.context).to_mask()
    half = Call(case.q[:, 2:], case.k[:, 1:], case.v[:, 1:], {"head_offset": 2})
    assert torch.equal(policy.select(half.q, half.k, half.context).to_mask(), whole[:, 2:])


@pytest.mark.parametrize("name", [*POLICIES, "lminfinite"])
def test_nothing_to_attend(name: str) -> None:
    policy = POLICIES.get(name, LMInfinite())
    for empty in (
        call(2, 0, 0),
        call(2, 3, 0),
        call(2, 0, 20),
        call(1, 0, 0, cu_seqlens_q=int32(0, 0, 0), cu_seqlens_k=int32(0, 0, 0)),
        call(1, 3, 20, cu_seqlens_q=int32(0, 0, 3), cu_seqlens_k=int32(0, 20, 20)),
    ):
        out, lse = policy(empty.q, empty.k, empty.v, layer_idx=1, rope=rope, **empty.options)
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        assert float(policy.select(empty.q, empty.k, empty.context).density()) == 0.0


def test_context_options_are_those_of_attention() -> None:
    case = CALLS["capped"]
    out, lse = longctx.attention(case.q, case.k, case.v, **AttentionContext(**case.options).options())
    assert_same((out, lse), masked(case, dense_mask(case)))
