"""What is known of a call of a layer, and what is noted of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.prefill import AttentionContext


@dataclass(frozen=True, kw_only=True, eq=False)
class CallContext(AttentionContext):
    """What a layer knows of a call besides q, k and v: causal, keys counted by `seqused_k` where that is given."""

    start: int | Tensor = 0  # keys stored before the call's own: a number, or int32 [batch]
    position_ids: Tensor | None = None  # int64 [batch or 1, seqlen_q]: RoPE positions of the query tokens

    def score_options(self) -> dict[str, Any]:
        """The keywords of `attention`, `gather_attention` and the scoring ops: all that a call may set."""
        return {"seqused_k": self.seqused_k, "softmax_scale": self.softmax_scale, "softcap": self.softcap}

    def weigh_sinks(self, out: Tensor, lse: Tensor) -> Tensor:
        """`out` with the share that the model's extra logits take, for ops that do not know them."""
        if self.sinks is None:
            return out
        return (out * torch.sigmoid(lse - self.sinks[:, None])[..., None]).to(out.dtype)


@dataclass(eq=False)
class Counts:
    """The tally of one layer. Keys are counted per kv head and query token; calls inside compiled graphs are not."""

    calls: int = 0  # that went to `attend`
    tokens: int = 0  # query tokens of these
    keys_read: int = 0  # by the budget: a last page may have had fewer
    keys_stored: int = 0  # what dense attention over the whole past would have read
