"""What the ops of linear attention share."""

from __future__ import annotations

import torch

CHUNK_SIZE = 64  # tokens of a chunk on every backend: splits on its multiples resume bitwise


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states of inputs in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
