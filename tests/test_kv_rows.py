"""`gather_kv`, `compact_kv` and `truncate_kv` against their twins, to the bit, and what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES
from checks import as_tuple, assert_same_bits, record
from kv_cases import NAMES, ascending, caches, compacted, compacted_paged, truncated_path
from op_case import Call, OpCase, generator, int32
from topk_cases import random_indices

MOVING = ("gather_kv", "compact_kv", "truncate_kv")


def check(case: OpCase, call: Call) -> tuple[Tensor, ...]:
    result = as_tuple(case.op(**call))
    assert_same_bits(result, as_tuple(case.twin(**call)))
    record(case.name, call.get("k", call.get("k_cache")).dtype)
    return result


@pytest.mark.sanitize
@pytest.mark.parametrize("name", MOVING)
def test_equal_to_the_twin(isa: str, name: str) -> None:
    case = CASES[name]
    for make in case.calls.values():
        for dtype in case.dtypes:
            check(case, make(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(12))
def test_random_lists(seed: int) -> None:
    """Lists in any order, with entries outside: gather_kv gives zeros there, compact_kv leaves them out."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, dtype=torch.int32)

    index_heads, num_entries = (1, 3)[seed % 2], (0, 1, 7, 300)[seed % 4]
    lists = {
        "indices": draw(2, index_heads, num_entries, low=-5, high=90),
        "counts": draw(2, index_heads, low=-1, high=num_entries + 2),
        "seqused_k": draw(2, low=-1, high=80),
    }
    check(CASES["gather_kv"], caches(torch.float32) | lists)
    check(CASES["compact_kv"], caches(torch.bfloat16, names=NAMES) | lists)
    draft = {"accepted": draw(2, num_entries, low=-2, high=12), "counts": lists["counts"][:, 0]}
    call = caches(torch.float16, names=NAMES) | draft | {"seqused_k": lists["seqused_k"], "num_draft_tokens": 10}
    check(CASES["truncate_kv"], call)


def test_gather_takes_rows_of_every_head() -> None:
    k, v = caches(torch.float32).values()
    indices = random_indices(2, 3, 30, num_blocks=75, seed=1).clamp(min=0)
    k_out, v_out = longctx.gather_kv(k, v, indices)
    for cache, out in ((k, k_out), (v, v_out)):
        assert torch.equal(out, cache.gather(2, indices.long()[..., None].expand(*indices.shape, cache.shape[3])))


def test_gathered_keys_attend_as_in_place() -> None:
    """Attention over the copy equals gather_attention over the selection."""
    k, v = caches(torch.float32).values()
    q = torch.randn(2, 6, 1, 16, generator=generator(2))
    indices, counts = longctx.topk_select(torch.rand(2, 3, 75, generator=generator(3)), 20)
    out, lse = longctx.gather_attention(q, k, v, indices[:, :, None], counts[..., None])
    copied, copied_lse = longctx.attention(q, *longctx.gather_kv(k, v, indices, counts))
    torch.testing.assert_close(copied, out)
    torch.testing.assert_close(copied_lse, lse)


def test_layers_share_a_list() -> None:
    """Several layers in one call are what each layer is alone."""
    layers = [caches(torch.bfloat16, names=NAMES, seed=seed) for seed in (1, 4, 7)]
    lists = {"indices": ascending(2, 1, 30, num_keys=75, seed=8)}
    draft = {"seqused_k": int32(75, 60), "num_draft_tokens": 6, "accepted": int32([0, 3, 5], [1, 2, -1])}
    for op, options in ((longctx.compact_kv, lists), (longctx.truncate_kv, draft)):
        alone = [{name: layer[name].clone() for name in NAMES} for layer in layers]
        expected = [op(**layer, **options) for layer in alone]
        together = [tuple(layer[name].clone() for layer in layers) for name in NAMES]
        lengths = op(*together, **options)
        for i, layer in enumerate(alone):
            assert_same_bits((lengths, together[0][i], together[1][i]), (expected[i], *layer.values()))


@pytest.mark.sanitize
def test_strided_caches_change_in_place() -> None:
    """A view of a larger buffer, rows of heads side by side: only the rows of the view change."""
    for make, op in ((compacted, longctx.compact_kv), (truncated_path, longctx.truncate_kv)):
        call = make(torch.float32)
        buffers = {name: torch.full((2, 80, 3, call[name].shape[3] + 5), torch.nan) for name in NAMES}
        views = {name: buffer[:, 2:77, :, 1:-4].transpose(1, 2).copy_(call[name]) for name, buffer in buffers.items()}
        lengths = op(**call | views)
        assert_same_bits((op(**call), *(call[name] for name in NAMES)), (lengths, *views.values()))
        for name, buffer in buffers.items():
            views[name].fill_(torch.nan)
            assert buffer.isnan().all()


@pytest.mark.sanitize
def test_pages_hold_what_contiguous_caches_hold() -> None:
    """The same rows move; pages of other entries stay as they are."""
    paged = compacted_paged(torch.float32)
    table, used = paged["page_table"], paged["seqused_k"]
    flat = {
        name: torch.stack([paged[name][row.long()].transpose(0, 1).flatten(1, 2) for row in table]) for name in NAMES
    }
    foreign = [page for page in range(15) if page not in table.flatten().tolist()]
    untouched = {name: paged[name][foreign].clone() for name in NAMES}
    options = {name: paged[name] for name in ("indices", "counts")}
    expected = longctx.compact_kv(**flat, **options, seqused_k=used)
    assert torch.equal(longctx.compact_kv(**paged), expected)
    for name in NAMES:
        for b, row in enumerate(table):
            assert torch.equal(paged[name][row.long()].transpose(0, 1).flatten(1, 2), flat[name][b])
        assert torch.equal(paged[name][foreign], untouched[name])


def test_no_draft_is_kept_without_acceptance() -> None:
    call = caches(torch.float32, names=NAMES)
    before = {name: call[name].clone() for name in NAMES}
    lengths = longctx.truncate_kv(**call, seqused_k=int32(75, 4), num_draft_tokens=6)
    assert lengths.tolist() == [69, 0]
    chain = longctx.truncate_kv(**call, seqused_k=int32(75, 4), num_draft_tokens=6, counts=int32(2, 5))
    assert chain.tolist() == [71, 3]  # of the second draft, tokens 0 and 1 would stand before key 0
    for name in NAMES:
        assert torch.equal(call[name], before[name])


def test_a_tree_path_equals_a_chain() -> None:
    """Keeping a path of a tree leaves the rows that a draft of the path alone would have written."""
    k, v = caches(torch.float32, names=NAMES).values()
    path = [0, 2, 5, 9]
    expected = [torch.cat([cache[:, :, :60], cache[:, :, [60 + node for node in path]]], dim=2) for cache in (k, v)]
    used = int32(72, 72)
    lengths = longctx.truncate_kv(k, v, used, 12, accepted=int32(path, path))
    assert lengths.tolist() == [64, 64]
    assert torch.equal(k[:, :, :64], expected[0])
    assert torch.equal(v[:, :, :64], expected[1])


def test_a_bad_layer_changes_no_other() -> None:
    good, bad = caches(torch.float32, names=NAMES), caches(torch.float32, names=NAMES)
    before = {name: good[name].clone() for name in NAMES}
    indices = ascending(2, 1, 30, num_keys=75, seed=8)
    together = {name: [good[name], bad[name]] for name in NAMES}
    for name, wrong in (("k_cache", bad["k_cache"][:, :, :70]), ("v_cache", bad["v_cache"].double())):
        with pytest.raises(ValueError, match=r"^longctx::compact_kv: `v_cache\[1\]` must "):
            longctx.compact_kv(**together | {name: [good[name], wrong]}, indices=indices)
    with pytest.raises(ValueError, match="longctx::compact_kv: `v_cache` must have as many layers"):
        longctx.compact_kv(**together | {"v_cache": [good["v_cache"]]}, indices=indices)
    with pytest.raises(ValueError, match="longctx::compact_kv: `k_cache` must hold at least one layer"):
        longctx.compact_kv([], [], indices)
    for name in NAMES:
        assert torch.equal(good[name], before[name])


@pytest.mark.parametrize("name", ["compact_kv", "truncate_kv"])
def test_caches_that_require_a_gradient_are_refused(name: str) -> None:
    call = CASES[name].calls["plain"](torch.float32)
    call["v_cache"].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"longctx::{name} has no backward"):
        CASES[name].public(**call)
    with torch.no_grad():
        CASES[name].public(**call)
