"""All keys, all read: what the other caches are measured against."""

from __future__ import annotations

from typing import Any, ClassVar

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache


class DenseCache(LongctxCache):
    """Every token attends to the whole past, by `longctx.attention`; grows without a copy per token.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.DenseCache(model.config)
        >>> tokens = model.generate(torch.ones(1, 8, dtype=torch.long), **cache.as_argument(), max_new_tokens=4)
        >>> cache.stats().share
        1.0
    """

    name: ClassVar[str] = "dense"

    def __init__(self, config: Any, *, max_cache_len: int | None = None) -> None:
        super().__init__(config, LongctxLayer, {}, max_cache_len)
