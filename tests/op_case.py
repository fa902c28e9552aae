"""What the shared tests know about an op, and the tensors that calls are built of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import longctx
import longctx.reference
import target

Call = dict[str, Any]

DTYPES = target.dtypes()

# Of merge_states, and of the ops that copy and move rows.
ALL_DTYPES = target.dtypes(float64=True)

INT32_MAX = 2**31 - 1

INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Invalid:
    """A call that only `validate=True` rejects: `argument` takes `value`, and the error names it."""

    variant: str
    argument: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """What the shared tests know about one op."""

    name: str
    calls: Mapping[str, Callable[[torch.dtype], Call]]  # variant -> valid call
    illegal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # option -> values that raise
    extreme: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # option -> odd, legal values
    legal_changes: frozenset[str] = frozenset()  # of those that test_bad_input makes, "<variant>: <change>"
    invalid: Mapping[str, Invalid] = field(default_factory=dict)  # why -> call
    differentiable: tuple[str, ...] = ()  # arguments that take a gradient
    has_backward: bool = False  # else a gradient of `differentiable` raises
    growing: Mapping[str, int] = field(default_factory=dict)  # arguments of "plain" that may be longer along a dim
    any_strides: frozenset[str] = frozenset()  # arguments that need no contiguous last dim
    mutates: tuple[str, ...] = ()  # arguments that the op changes
    zeros: frozenset[str] = frozenset()  # arguments that must hold, and keep, zeros
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def public(self) -> Callable[..., Any]:
        return getattr(longctx, self.name)  # type: ignore[no-any-return]

    @property
    def op(self) -> Callable[..., Any]:
        """The op; where it changes arguments, on copies that it returns behind the outputs."""
        return self._on_copies(self.public)

    @property
    def twin(self) -> Callable[..., Any]:
        return self._on_copies(getattr(longctx.reference, self.name))

    def _on_copies(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.mutates:
            return function

        @functools.wraps(function)
        def on_copies(**call: Any) -> tuple[Any, ...]:
            copies = {name: call[name].clone() for name in self.mutates if name in call}
            result = function(**(call | copies))
            return *(() if result is None else (result,)), *copies.values()

        return on_copies


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 37,
    seqlen_k: int = 75,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    seed: int = 0,
) -> Call:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    return {
        "q": randn(batch, num_q_heads, seqlen_q, head_dim, dtype=dtype, seed=seed),
        "k": randn(batch, num_kv_heads, seqlen_k, head_dim, dtype=dtype, seed=seed + 1),
        "v": randn(batch, num_kv_heads, seqlen_k, head_dim_v, dtype=dtype, seed=seed + 2),
    }


def without(call: Callable[[torch.dtype], Call], *names: str) -> Callable[[torch.dtype], Call]:
    return lambda dtype: {name: value for name, value in call(dtype).items() if name not in names}


ILLEGAL_OPTIONS = {
    "softmax_scale": (float("nan"), float("inf")),
    "window_size_left": (-2, -INT64_MAX),
    "window_size_right": (-2, -INT64_MAX),
    "num_sink_tokens": (-1, -INT64_MAX),
    "softcap": (float("nan"), float("inf"), -1.0),
}

EXTREME_OPTIONS = {
    "softmax_scale": (0.0, -1.0),
    "window_size_left": (INT32_MAX, INT64_MAX),
    "window_size_right": (INT32_MAX, INT64_MAX),
    "num_sink_tokens": (INT32_MAX, INT64_MAX),
    "softcap": (1e30,),
}
