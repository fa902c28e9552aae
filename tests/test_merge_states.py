"""`merge_states` against its float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import longctx
from cases import CASES
from checks import assert_accurate, assert_equal_to_rounding, in_float64, record, residuals
from op_case import ALL_DTYPES, DTYPES, Call, qkv, randn
from prefill_cases import overridden_states, states


def peer(out: Tensor, lse: Tensor, lse_override: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, weights rounded to the dtype of `out`."""
    logits = lse if lse_override is None else lse_override
    merged = torch.logsumexp(logits, dim=0)
    weights = torch.exp(logits - merged).nan_to_num().to(out.dtype)
    present = ~torch.isneginf(logits)[..., None]
    return (weights[..., None] * out.where(present, 0)).sum(dim=0), merged


def extended(out: Tensor, lse: Tensor, lse_override: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The formula in extended precision, without regard to overflow."""
    logits = (lse if lse_override is None else lse_override).numpy().astype(np.longdouble)
    weights = np.exp(logits)
    mass = weights.sum(axis=0)
    states = np.where(weights[..., None] > 0, out.double().numpy().astype(np.longdouble), 0)
    merged = (weights[..., None] * states).sum(axis=0) / np.maximum(mass, np.finfo(np.longdouble).tiny)[..., None]
    return merged, np.log(mass, where=mass > 0, out=np.full_like(mass, -np.inf))


def check(call: Call) -> tuple[Tensor, Tensor]:
    case = CASES["merge_states"]
    out, lse = case.op(**call)
    exact = exact_out, exact_lse = case.twin(**in_float64(call))
    peer_out, peer_lse = peer(**call)
    assert out.dtype == call["out"].dtype
    assert lse.dtype == call["lse"].dtype
    missed_out, missed_lse = residuals(extended(**call), exact)
    assert_accurate("out", out, exact_out, peer_out, residual=missed_out)
    empty = torch.isneginf(exact_lse)
    assert torch.equal(torch.isneginf(lse), empty)
    assert not out[empty].any()
    assert_accurate("lse", lse[~empty], exact_lse[~empty], peer_lse[~empty], residual=missed_lse[~empty])
    record("merge_states", out.dtype)
    return out, lse


def random_states(dtype: torch.dtype, *shape: int) -> Call:
    wide = torch.promote_types(dtype, torch.float32)
    return {"out": randn(*shape, dtype=dtype, seed=0), "lse": randn(*shape[:4], dtype=wide, seed=1)}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("make", [states, overridden_states])
def test_matches_the_twin(isa: str, dtype: torch.dtype, make: type) -> None:
    check(make(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (1, 2, 3, 5, 8), (2, 1, 1, 33, 1), (7, 1, 2, 9, 300), (2, 0, 3, 4, 5), (2, 1, 3, 0, 5)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(random_states(dtype, *shape))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_one_state_is_returned_as_it_is(dtype: torch.dtype) -> None:
    call = random_states(dtype, 1, 2, 3, 5, 8)
    out, lse = longctx.merge_states(**call)
    assert torch.equal(out, call["out"][0])
    assert torch.equal(lse, call["lse"][0])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_absent_states_add_nothing(dtype: torch.dtype) -> None:
    call = random_states(dtype, 3, 1, 2, 11, 16)
    call["lse"][1] = -torch.inf
    call["out"][1] = torch.nan
    present = {name: value[[0, 2]] for name, value in call.items()}
    for a, b in zip(check(call), longctx.merge_states(**present), strict=True):
        assert torch.equal(a, b)


def test_no_state_present() -> None:
    call = random_states(torch.float32, 2, 1, 2, 3, 4)
    call["lse"].fill_(-torch.inf)
    call["out"].fill_(torch.nan)
    out, lse = longctx.merge_states(**call)
    assert not out.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38])
def test_far_from_zero(offset: float) -> None:
    """Only differences of lse count: no exponential of a large number."""
    call = random_states(torch.float32, 2, 1, 2, 3, 4)
    call["lse"] = torch.tensor([offset, offset]).view(2, 1, 1, 1).expand(2, 1, 2, 3).contiguous()
    out, lse = longctx.merge_states(**call)
    torch.testing.assert_close(out, call["out"].mean(dim=0))
    torch.testing.assert_close(lse, call["lse"][0] + torch.tensor(2.0).log())


def test_merging_in_steps_equals_merging_at_once() -> None:
    call = random_states(torch.float64, 4, 2, 2, 9, 8)
    halves = [longctx.merge_states(call["out"][s], call["lse"][s]) for s in (slice(0, 2), slice(2, 4))]
    merged = longctx.merge_states(*(torch.stack(parts) for parts in zip(*halves, strict=True)))
    assert_equal_to_rounding(merged, longctx.merge_states(**call))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize >= 4], ids=str)
def test_attention_over_parts_of_the_keys(isa: str, dtype: torch.dtype) -> None:
    call = qkv(dtype, seqlen_k=90)
    parts = []
    for begin, end in ((0, 1), (1, 40), (40, 90)):
        key_ranges = torch.tensor([begin, end], dtype=torch.int32).expand(2, 1, 37, 2)
        parts.append(longctx.attention(**call, key_ranges=key_ranges))
    merged = longctx.merge_states(*(torch.stack(states) for states in zip(*parts, strict=True)))
    assert_equal_to_rounding(merged, longctx.attention(**call))
