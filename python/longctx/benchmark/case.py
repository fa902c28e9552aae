"""What a measured case is: its inputs, what one would use instead, and the work it has to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 128


@dataclass(frozen=True)
class Contenders:
    """Callables on the same inputs; the first one is ours."""

    run: Mapping[str, Callable[[], object]]
    flops: float  # of the visited (query, key) pairs, not of the dense square
    bytes: float  # each input read once, each output written once
    exact: Callable[[], object] | None = None  # the naive twin, where the peers compute something else


@dataclass(frozen=True)
class Case:
    """One line of the table. `goals` maps a contender to (minimum, goal) for peer time / our time."""

    name: str
    op: str
    length: int
    dtype: torch.dtype
    make: Callable[[int, torch.dtype], Contenders]
    goals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def contenders(self, length: int | None = None) -> Contenders:
        return self.make(length or self.length, self.dtype)

    def check(self) -> None:
        """Compares our output with every peer's (or the twin's) at a short length; raises on a difference."""
        contenders = self.contenders(min(self.length, 4 * BLOCK))
        run = contenders.run
        if contenders.exact is not None:
            run = {"longctx": run["longctx"], "the naive twin": contenders.exact}
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        outputs = {name: _first(fn()).float() for name, fn in run.items()}
        ours, *peers = outputs
        for peer in peers:
            try:
                torch.testing.assert_close(outputs[ours], outputs[peer], atol=tolerance, rtol=tolerance)
            except AssertionError as error:
                raise AssertionError(f"{self.name}: longctx differs from {peer}: {error}") from None


def _first(result: object) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]


def qkv(length: int, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, h, length, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))


def attention_work(q: Tensor, k: Tensor, pairs: float) -> tuple[float, float]:
    """FLOPs and bytes when every query head scores `pairs` (query, key) pairs."""
    heads, dim = q.shape[1], q.shape[3]
    return 4.0 * heads * dim * pairs, float(2 * (q.nbytes + k.nbytes))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def partial(make: Callable[..., Contenders], **options: object) -> Callable[..., Contenders]:
    return functools.partial(make, **options)
