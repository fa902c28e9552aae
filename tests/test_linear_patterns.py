"""The four attention patterns of CAB (arXiv 2210.07661) as calls of linear_attention: what each row may depend on.

Causal or not, over the sequence itself or over another. "Causal cross" is causal in the queries: all of the other
sequence is known, and a row may not change when a later query does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from checks import assert_same_bits, in_float64
from linear_cases import linear
from longctx import reference
from op_case import DTYPES
from test_linear_attention import TOLERANCE, relative_error

SEQLEN = 150  # two chunks and a ragged one
PATTERNS: dict[str, dict[str, Any]] = {
    "causal self": {"seqlen_k": SEQLEN, "causal": True},
    "noncausal self": {"seqlen_k": SEQLEN, "causal": False},
    "causal cross": {"seqlen_k": 90, "causal": False},
    "noncausal cross": {"seqlen_k": 210, "causal": False},
}
AT = (0, 63, 64, 100)


def call_of(pattern: str, dtype: torch.dtype, *, decay: bool = True, normalize: bool = False) -> dict[str, Any]:
    """With decays of 0 and -inf among the heads, or without any."""
    sizes = {"seqlen_q": SEQLEN, "seqlen_k": PATTERNS[pattern]["seqlen_k"], "head_dim": 24, "head_dim_v": 40}
    call = linear(dtype, decay=(4,), normalize=normalize, **sizes)
    return call | {
        "log_decay": call["log_decay"] if decay else None,
        "causal": PATTERNS[pattern]["causal"],
        "normalize": normalize,
        "num_segments": 1,
    }


def rows_that_change(call: dict[str, Any], change: Callable[[dict[str, Tensor]], None]) -> Tensor:
    """bool `[seqlen_q]`: which rows of the output are other bits than before."""
    before, _ = longctx.linear_attention(**call)
    changed = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    change(changed)
    after, _ = longctx.linear_attention(**changed)
    return (before != after).any(-1).any(1).any(0)


def rows(begin: int, end: int = SEQLEN) -> Tensor:
    expected = torch.zeros(SEQLEN, dtype=torch.bool)
    expected[begin:end] = True
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"decay": False}], ids=str)
def test_values(dtype: torch.dtype, pattern: str, options: dict[str, Any]) -> None:
    call = call_of(pattern, dtype, **options)
    out, state = longctx.linear_attention(**call)
    exact, exact_state = reference.linear_attention(**in_float64(call))
    assert relative_error(out, exact) <= TOLERANCE[dtype]
    assert relative_error(state, exact_state) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("at", AT)
def test_a_query_changes_its_own_row_alone(dtype: torch.dtype, pattern: str, at: int) -> None:
    """So nothing of a later query reaches an earlier row, whichever the pattern."""

    def change(call: dict[str, Tensor]) -> None:
        call["q"][:, :, at] += 1.0

    assert_same_bits(rows_that_change(call_of(pattern, dtype), change), rows(at, at + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("argument", ["k", "v"])
@pytest.mark.parametrize("at", [at for at in AT if at < 90])
def test_a_key_changes_the_rows_that_see_it(dtype: torch.dtype, pattern: str, argument: str, at: int) -> None:
    """Without decay, so that no weight is too small to show: its own row and later ones if causal, else all."""

    def change(call: dict[str, Tensor]) -> None:
        call[argument][:, :, at] += 100.0

    changed = rows_that_change(call_of(pattern, dtype, decay=False), change)
    assert_same_bits(changed, rows(at if PATTERNS[pattern]["causal"] else 0))


@pytest.mark.parametrize("pattern", ["noncausal self", "causal cross", "noncausal cross"])
def test_the_weight_of_a_key_falls_on_both_sides(pattern: str) -> None:
    """With decay key `j` counts in row `i` by `exp(log_decay |i - j|)`; positions count from 0 on both sides."""
    seqlen_k, at = PATTERNS[pattern]["seqlen_k"], 40
    q, k, v = torch.ones(1, 1, SEQLEN, 1), torch.zeros(1, 1, seqlen_k, 1), torch.ones(1, 1, seqlen_k, 1)
    k[:, :, at] = 1.0
    out, _ = longctx.linear_attention(q, k, v, torch.tensor([-0.1]), causal=False)
    expected = torch.exp(-0.1 * (torch.arange(SEQLEN) - at).abs())
    torch.testing.assert_close(out[0, 0, :, 0], expected, rtol=1e-5, atol=1e-7)


def test_causal_attention_to_another_sequence_is_refused() -> None:
    call = call_of("noncausal cross", torch.float32) | {"causal": True}
    with pytest.raises(ValueError, match="as long as `q` when `causal`"):
        longctx.linear_attention(**call)
