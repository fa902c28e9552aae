"""Positions of a method's own: where the tokens of a call stand, and rotations that keys get where they are read.

Keys are stored as the model rotated them, each at its index in the text. RoPE knows distances only, so a key moves by a
rotation of the difference: `gather_attention` makes it in float32, in registers, from a table with a row a distance.
Nothing is stored twice, and a prompt or a turn still finds every key where the model put it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.cache.call import CallContext
from longctx.prefill.lminfinite import rerotate
from longctx.prefill.policy import Rope

__all__ = ["Turns", "rerotate", "token_positions"]


class Turns:
    """Rows that turn by 0, `step`, 2 `step`, .. positions, for `rope_cos_sin`: made once for all layers, and grown.

    A `step` of -1 takes the position out of the key that stands at a row's index; one of a block's size moves whole
    blocks.
    """

    def __init__(self, rope: Rope, step: int) -> None:
        self.rope, self.step = rope, step
        self._rows: Tensor | None = None

    def table(self, num_rows: int, device: torch.device) -> Tensor:
        """float32 `[num_rows or more, 2, rotary_dim / 2]`."""
        if self._rows is None or len(self._rows) < num_rows or self._rows.device != device:
            positions = torch.arange(num_rows + num_rows // 4 + 64, device=device) * self.step
            cos, sin = (x[0, :, : x.shape[2] // 2].float() for x in self.rope(positions[None]))
            self._rows = torch.stack([cos, sin], dim=1)
        return self._rows


def token_positions(q: Tensor, k: Tensor, context: CallContext) -> Tensor:
    """Index among the keys of each query token: int64 `[batch, seqlen_q]`."""
    used = context.seqused_k
    if used is None:
        used = torch.full((q.shape[0],), k.shape[2], device=q.device)
    return used[:, None].long() + torch.arange(-q.shape[2], 0, device=q.device)
