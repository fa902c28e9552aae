"""Caches for transformers' `generate` that read, or keep, few of their keys: one file a method.

`longctx.cache.make_cache(model.config, "quest", budget=2048)` goes to `generate` as `**cache.as_argument()`; the model
runs on ``attn_implementation="longctx"`` (`longctx.apply`).
"""

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache
from longctx.cache.call import CallContext, Counts
from longctx.cache.dense import DenseCache
from longctx.cache.infllm import InfLLMCache
from longctx.cache.landmark import LandmarkCache
from longctx.cache.longheads import LongHeadsCache
from longctx.cache.make import load, make_cache
from longctx.cache.quest import QuestCache
from longctx.cache.recycled import RecycledCache
from longctx.cache.sirllm import SirLLMCache
from longctx.cache.snapkv import SnapKVCache
from longctx.cache.squeezed import SqueezedCache
from longctx.cache.stats import CacheStats
from longctx.cache.storage import Storage
from longctx.cache.streaming import StreamingCache
from longctx.cache.tiered import TieredQuestCache

__all__ = [
    "CacheStats",
    "CallContext",
    "Counts",
    "DenseCache",
    "InfLLMCache",
    "LandmarkCache",
    "LongHeadsCache",
    "LongctxCache",
    "LongctxLayer",
    "QuestCache",
    "RecycledCache",
    "SirLLMCache",
    "SnapKVCache",
    "SqueezedCache",
    "Storage",
    "StreamingCache",
    "TieredQuestCache",
    "load",
    "make_cache",
]
