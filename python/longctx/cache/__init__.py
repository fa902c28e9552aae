"""Caches for transformers' `generate` that read, or keep, few of their keys. One file a method.

longctx.apply(model, "dense")
cache = longctx.cache.make_cache(model.config, "streaming", window_size=2048)
model.generate(input_ids, past_key_values=cache)
"""

from longctx.cache.base import CallContext, Counts, LongctxLayer
from longctx.cache.cache import LongctxCache
from longctx.cache.dense import DenseCache
from longctx.cache.make import load, make_cache
from longctx.cache.recycled import RecycledCache
from longctx.cache.sirllm import SirLLMCache
from longctx.cache.snapkv import SnapKVCache
from longctx.cache.stats import CacheStats
from longctx.cache.storage import Storage
from longctx.cache.streaming import StreamingCache
from longctx.cache.tiered import TieredQuestCache

__all__ = [
    "CacheStats",
    "CallContext",
    "Counts",
    "DenseCache",
    "LongctxCache",
    "LongctxLayer",
    "RecycledCache",
    "SirLLMCache",
    "SnapKVCache",
    "Storage",
    "StreamingCache",
    "TieredQuestCache",
    "load",
    "make_cache",
]
