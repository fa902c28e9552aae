"""The rows of `longctx demo --decode`: a cache each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longctx.cache import make_cache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

BUDGET = 2048
WINDOW = 1024


@dataclass(frozen=True)
class CacheRow:
    """One way to remember."""

    name: str
    method: str | None  # of `make_cache`; None: transformers' own cache under SDPA
    options: Mapping[str, Any] = field(default_factory=dict)
    finds_all: bool = False  # it must find every needle
    reach: int | None = None  # it must find the needles that are nearer than this, and no other
    turn: int = 0  # it reads the context itself, so many tokens at a time

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[Cache]:
        if self.method is None:
            from transformers import DynamicCache

            yield DynamicCache(config=model.config)
        else:
            yield make_cache(model.config, self.method, **self.options)


SDPA = CacheRow("SDPA", None, finds_all=True)
DENSE = CacheRow("Dense", "dense", finds_all=True)
ROWS = (
    SDPA,
    DENSE,
    CacheRow("Recycled", "recycled", {"budget": BUDGET, "stride": 4}),
    CacheRow("StreamingLLM", "streaming", {"num_sink_tokens": 4, "window_size": BUDGET - 4}, reach=BUDGET - 4),
    CacheRow("SnapKV", "snapkv", {"budget": BUDGET}),
    CacheRow("SirLLM", "sirllm", {"num_entropy_tokens": BUDGET - 4}, turn=BUDGET),
    CacheRow(f"Window {WINDOW} (control)", "streaming", {"num_sink_tokens": 0, "window_size": WINDOW}, reach=WINDOW),
)
