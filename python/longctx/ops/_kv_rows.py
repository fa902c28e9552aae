"""What gather_kv, compact_kv and truncate_kv share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.ops import _validate


def layers(cache: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [cache] if isinstance(cache, Tensor) else list(cache)


def refuse_gradients(op: str, caches: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(cache.requires_grad for cache in caches):
        raise NotImplementedError(
            f"longctx::{op} has no backward: it changes the caches in place; call it under torch.no_grad()"
        )


def list_ends(op: str, k: Tensor, batch: int, seqused_k: Tensor | None, page_table: Tensor | None) -> Tensor:
    """int32 `[batch]`: the number of keys of each batch entry, after a check of what says so."""
    room = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[2]
    _validate.lengths(op, "seqused_k", seqused_k, room)
    _validate.pages(op, page_table, seqused_k, k)
    return seqused_k if seqused_k is not None else torch.full((batch,), room, dtype=torch.int32, device=k.device)
