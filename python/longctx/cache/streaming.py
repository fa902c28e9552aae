"""StreamingLLM: the first tokens and a window.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

The softmax leans on the first tokens of a text, whatever they say; with them kept, a window of the last ones suffices
for fluent text. What has left the window is forgotten.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.positions import rerotate, token_positions
from longctx.ops import attention, gather_attention, merge_states
from longctx.prefill.policy import Rope


class StreamingLayer(LongctxLayer):
    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_sink_tokens: int,
        window_size: int,
        rope: Rope | None = None,
        max_cache_len: int | None = None,
    ) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.window_size = window_size
        self.rope = rope
        super().__init__(config, layer_idx, max_cache_len)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        self.count(self.num_sink_tokens + self.window_size, q.shape[2])
        if self.rope is not None and self.num_sink_tokens > 0:
            return self._attend_at_slots(q, k, v, context, self.rope)
        nothing = torch.empty(q.shape[0], 1, q.shape[2], 0, dtype=torch.int32, device=q.device)
        forced: dict[str, Any] = {"num_first": self.num_sink_tokens, "num_last": self.window_size}
        out, lse = gather_attention(q, k, v, nothing, **forced, workspace=self.workspace(q), **context.score_options())
        return context.weigh_sinks(out, lse)

    def _attend_at_slots(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext, rope: Rope) -> Tensor:
        """With positions counted in a cache of sinks and window: only the distance to the sinks is another one.

        So the window is seen by q as it is, the sinks by q at the cache's last position, and the two results merge.
        """
        if context.position_ids is None:
            raise NotImplementedError(
                "longctx: positions in the cache need `position_ids`, which this model does not pass"
            )
        num_sinks = self.num_sink_tokens
        end = token_positions(q, k, context) + 1
        start = (end - self.window_size).clamp(min=num_sinks)
        scores: dict[str, Any] = {"softmax_scale": context.softmax_scale, "softcap": context.softcap, "causal": False}
        near = torch.stack([start, end], dim=-1)[:, None].int()
        far = torch.stack([torch.zeros_like(end), end.clamp(max=num_sinks)], dim=-1)[:, None].int()
        position = context.position_ids.expand(q.shape[0], -1)
        q_far = rerotate(q, position, position.clamp(max=num_sinks + self.window_size - 1), rope)
        states = (
            attention(q, k, v, key_ranges=near, **scores),
            attention(q_far, k[:, :, :num_sinks], v[:, :, :num_sinks], key_ranges=far, **scores),
        )
        out, lse = merge_states(*(torch.stack(parts) for parts in zip(*states, strict=True)))
        return context.weigh_sinks(out, lse)

    def make_room(self, seqlen_q: int) -> None:
        """Drops what has left the window, a quarter of it at a time."""
        kept = self.num_sink_tokens + self.window_size
        if self.max_cache_len is not None or self.slots <= kept + max(self.window_size // 4, 16):
            return
        assert self.keys is not None
        slot = torch.arange(kept, dtype=torch.int32, device=self.device)
        dropped = torch.full_like(slot[:1], self.slots - kept) if self.rows is None else (self.rows - kept).clamp(min=0)
        last = (slot + dropped[:, None]).expand(self.batch_size, -1)
        indices = torch.where(slot < self.num_sink_tokens, slot, last)[:, None].int()
        self.keep(indices, rows=None if self.rows is None else self.rows.clamp(max=kept))


class StreamingCache(LongctxCache):
    """The first `num_sink_tokens` and the last `window_size` tokens; the memory of a text without end is constant.

    Args:
        config: `model.config`.
        num_sink_tokens: first tokens that stay; 4 in the paper.
        window_size: last tokens that are seen, the current one included.
        rope: `longctx.integrations.transformers.find_rope(model)` counts positions in the cache, as in the paper: no
            token is ever farther away than the cache is long, so a text may exceed what the model was trained on.
            `None` keeps true positions.
        max_cache_len: static shapes; nothing is then dropped, only not read.

    Exact: equals attention with the mask. Do not use it where the answer may lie in the middle of the text.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.StreamingCache(model.config, window_size=60)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=3)
        >>> print(cache.stats())
        layer  tokens  keys read a token  of
            0       2               64.0  201.5
            1       2               64.0  201.5
    """

    name: ClassVar[str] = "streaming"

    def __init__(
        self,
        config: Any,
        *,
        num_sink_tokens: int = 4,
        window_size: int = 1020,
        rope: Rope | None = None,
        max_cache_len: int | None = None,
    ) -> None:
        require("num_sink_tokens", num_sink_tokens, at_least=0)
        require("window_size", window_size, at_least=1)
        options = {"num_sink_tokens": num_sink_tokens, "window_size": window_size}
        super().__init__(config, StreamingLayer, options, max_cache_len, rope=rope)
