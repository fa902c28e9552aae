"""Helpers for tests of the ops and of code that calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from typing import Literal

import torch
from torch import Tensor

ISAS = ("generic", "avx2", "avx512", "amx")  # ascending: a level includes all before it


def unit_in_last_place(magnitude: float, dtype: torch.dtype) -> float:
    """Distance from `magnitude` to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return float(info.tiny) * info.eps
    return float(2.0 ** torch.tensor(magnitude, dtype=torch.float64).log2().floor() * info.eps)


def error_ratio(actual: Tensor, exact: Tensor, *peers: Tensor, residual: Tensor | None = None) -> float:
    """Largest error of `actual` over what the accuracy rule allows; at most 1 passes.

    Allowed is twice the largest error of `peers`, PyTorch's results in the same dtype, plus one unit in the last place
    of the largest magnitude of `exact`, the result in float64. Where float64 itself is judged, `residual` is what
    `exact` misses.
    """

    def largest_error(result: Tensor) -> float:
        error = result.double() - exact if residual is None else result.double() - exact - residual
        return float(error.abs().max())  # NaN where there is one

    if exact.numel() == 0:
        return 0.0
    unit = unit_in_last_place(float(exact.abs().max()), actual.dtype)
    error = largest_error(actual)
    return float("inf") if isnan(error) else error / (2.0 * max(map(largest_error, peers)) + unit)


def surround_with_nan(tensor: Tensor, *, layout: Literal["bhsd", "bshd"] = "bhsd", margin: int = 3) -> Tensor:
    """A view equal to `tensor` inside a larger buffer whose every other element is NaN.

    `layout="bshd"` stores a `[batch, heads, seqlen, dim]` tensor as `[batch, seqlen, heads, dim]`.
    """
    source = tensor.transpose(1, 2) if layout == "bshd" else tensor
    buffer = source.new_full([size + 2 * margin for size in source.shape], float("nan"))
    view = buffer[tuple(slice(margin, margin + size) for size in source.shape)]
    view.copy_(source)
    return view.transpose(1, 2) if layout == "bshd" else view


def block_list(mask: Tensor, *, spare: int = 0) -> tuple[Tensor, Tensor]:
    """`(block_indptr, block_indices)` of a bool `[batch, heads, num_q_blocks, num_k_blocks]` mask.

    `spare` unused entries of -1 follow the list, as behind a builder's capacity.
    """
    ends = mask.sum(dim=-1).flatten().cumsum(0).view(mask.shape[:3])
    per_head = mask.flatten(2).sum(dim=-1)
    begins = (per_head.flatten().cumsum(0) - per_head.flatten()).view(per_head.shape)
    indptr = torch.cat([begins[..., None], ends], dim=-1)
    indices = mask.nonzero()[:, -1].to(torch.int32)
    return indptr, torch.cat([indices, indices.new_full((spare,), -1)])


def active_isa() -> str:
    """The instruction set that the CPU kernels use now."""
    return str(json.loads(torch.ops.longctx.build_info())["isa"])


def available_isas() -> tuple[str, ...]:
    """The instruction sets that `force_isa` accepts on this machine, ascending."""
    detected = json.loads(torch.ops.longctx.build_info())["detected_isa"]
    return ISAS[: ISAS.index(detected) + 1]


@contextmanager
def force_isa(isa: str) -> Iterator[None]:
    """Inside, CPU kernels use nothing above `isa`; raises ValueError where the CPU lacks it."""
    before = active_isa()
    torch.ops.longctx._force_isa(isa)
    try:
        yield
    finally:
        torch.ops.longctx._force_isa(before)


@contextmanager
def force_cuda_path(path: Literal["auto", "sm80", "sm90"]) -> Iterator[None]:
    """Inside, 16-bit attention on CUDA takes this path, and raises where it cannot; "auto" changes nothing."""
    if path == "auto":
        yield
        return
    torch.ops.longctx._force_cuda_path(path)
    try:
        yield
    finally:
        torch.ops.longctx._force_cuda_path("auto")
