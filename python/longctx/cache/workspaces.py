"""Zeros that `gather_attention` counts in, so that a step of a cache needs one launch for it on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspaces:
    """One tensor a device, for all layers of a cache: their calls follow each other."""

    def __init__(self) -> None:
        self._zeros: dict[torch.device, Tensor] = {}

    def zeros(self, device: torch.device, size: int) -> Tensor:
        """int32 `[at least size]`; where it grows, all zeros are new."""
        found = self._zeros.get(device)
        if found is None or found.shape[0] < size:
            found = self._zeros[device] = torch.zeros(size, dtype=torch.int32, device=device)
        return found
