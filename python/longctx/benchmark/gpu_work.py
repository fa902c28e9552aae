"""What a case of a GPU benchmark is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHECKED_ROWS = 64
Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Work:
    """Contenders on the same inputs; the first one is ours."""

    inputs: Inputs
    contenders: Mapping[str, Run]
    flops: float  # of the visited (query, key) pairs, not of the dense square
    bytes: float  # each input read once, each output written once
    # (name, output): raises where it is wrong. None: the tests of the op compare more than could be done here.
    check: Callable[[str, Any], None] | None = None


@dataclass(frozen=True)
class GpuCase:
    """One line of the table."""

    title: str
    op: str
    length: int
    make: Callable[[int, str], Work]
    small: int = 512  # the length at which a test without a GPU builds and runs it
    dtype: str = "bfloat16"

    def name(self, length: int | None = None) -> str:
        return f"{self.op}: {self.title}, {length or self.length}"

    def work(self, device: str, length: int | None = None) -> Work:
        return self.make(length or self.length, device)


def randn(*shape: int, device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed) if device != "meta" else None
    return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32).to(dtype)


def gpu_case(title: str, op: str, length: int, make: Callable[..., Work], small: int = 512, **options: Any) -> GpuCase:
    dtype = str(options.get("dtype", torch.bfloat16)).removeprefix("torch.")
    return GpuCase(title, op, length, functools.partial(make, **options), small, dtype)
