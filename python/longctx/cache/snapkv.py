"""SnapKV: what the last tokens of a prompt look at is all that is kept of it.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469).

The queries at the end of a prompt, the observation window, give every key its share of their softmax. Averaged over
the query heads of a kv head and smoothed along the sequence, the best keys stay, with the window, and the others are
dropped before the first token is decoded.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.ops import attention_mass, topk_select


class SnapKVLayer(LongctxLayer):
    STATE: ClassVar[tuple[str, ...]] = ("scores",)
    scores: Tensor | None  # float32 [batch, num_kv_heads, n], of the prompt that is to be cut

    def __init__(self, config: Any, layer_idx: int, *, budget: int, window_size: int, pool_size: int, **shapes: Any):
        self.budget, self.window_size, self.pool_size = budget, window_size, pool_size
        super().__init__(config, layer_idx, **shapes)

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self.scores = None
        if k.shape[2] <= self.budget:
            return
        mass = attention_mass(q[:, :, -self.window_size :], k, **context.score_options())
        mass = mass.unflatten(1, (k.shape[1], -1)).mean(2)
        self.scores = avg_pool1d(mass, self.pool_size, stride=1, padding=self.pool_size // 2)

    def make_room(self, seqlen_q: int) -> None:
        """Cuts the prompt when it is over; a long call may be its next chunk."""
        if self.scores is None or seqlen_q > self.max_seqlen_q:
            return
        lengths = None if self.rows is None else self.rows[:, None].expand(self.scores.shape[:2]).contiguous()
        indices, counts = topk_select(self.scores, self.budget, lengths=lengths, num_last=self.window_size)
        self.keep(indices, counts, rows=None if self.rows is None else self.rows.clamp(max=self.budget))
        self.scores = None

    def cropped(self) -> None:
        self.scores = None


class SnapKVCache(LongctxCache):
    """Cuts each prompt to `budget` keys a kv head; tokens after it are all kept.

    Args:
        config: `model.config`.
        budget: keys that stay, with the window.
        window_size: queries at the end of a prompt that vote, whose keys stay.
        pool_size: odd number of neighbours over which votes are averaged.

    The prompt itself is read exactly. Each later turn is cut again with what is left of the ones before. Do not use it
    where a later question asks for something else than the prompt's end did.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.SnapKVCache(model.config, budget=100, window_size=32)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=3)
        >>> print(cache.stats())
        layer  tokens  keys read a token  of
            0       2              101.5  201.5
            1       2              101.5  201.5
    """

    name: ClassVar[str] = "snapkv"

    def __init__(self, config: Any, *, budget: int = 2048, window_size: int = 64, pool_size: int = 5) -> None:
        require("window_size", window_size, at_least=1)
        require("budget", budget, at_least=window_size)
        require("pool_size", pool_size, at_least=1, odd=True)
        options = {"budget": budget, "window_size": window_size, "pool_size": pool_size}
        super().__init__(config, SnapKVLayer, options)
