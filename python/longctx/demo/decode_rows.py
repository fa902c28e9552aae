"""The rows of `longctx demo --decode`: a cache each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longctx.cache import make_cache
from longctx.integrations.transformers import find_rope
from longctx.store import PageGeometry, PageStore

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

BUDGET = 2048
WINDOW = 1024
QUEST = {"budget": BUDGET, "num_dense_layers": 0}


@dataclass(frozen=True)
class CacheRow:
    """One way to remember."""

    name: str
    method: str | None  # of `make_cache`; None: transformers' own cache under SDPA
    options: Mapping[str, Any] = field(default_factory=dict)
    finds_all: bool = False  # it must find every needle
    reach: int | None = None  # it must find the needles that are nearer than this, and no other
    max_host_bytes: int = 0  # its keys and values lie in a page store on disk, with so much memory in front
    page_size: int = 64  # of the store
    wants_rope: bool = False  # it turns keys to positions of its own
    turn: int = 0  # it reads the context itself, so many tokens at a time

    @property
    def forks(self) -> bool:
        """Whether every question gets a fork of the cache; the others are cut back after each."""
        return self.method is not None and not self.max_host_bytes

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[Cache]:
        if self.method is None:
            from transformers import DynamicCache

            yield DynamicCache(config=model.config)
        elif not self.max_host_bytes:
            rope = {"rope": find_rope(model)} if self.wants_rope else {}
            yield make_cache(model.config, self.method, **self.options, **rope)
        else:
            geometry = PageGeometry.of(model.config, page_size=self.page_size, dtype=model.dtype)
            with (
                tempfile.TemporaryDirectory() as directory,
                PageStore(geometry, path=f"{directory}/kv", max_host_bytes=self.max_host_bytes) as store,
            ):
                yield make_cache(model.config, self.method, store=store, **self.options)


SDPA = CacheRow("SDPA", None, finds_all=True)
DENSE = CacheRow("Dense", "dense", finds_all=True)
ROWS = (
    SDPA,
    DENSE,
    CacheRow("Best keys (control)", "quest", {**QUEST, "page_size": 1}, finds_all=True),
    CacheRow("Quest, pages of 4", "quest", {**QUEST, "page_size": 4}),
    CacheRow("Quest, pages of 16", "quest", {**QUEST, "page_size": 16}),
    CacheRow("Quest on disk, pages of 4", "tiered_quest", {"budget": BUDGET}, page_size=4, max_host_bytes=16 << 20),
    CacheRow("InfLLM", "infllm", {"window_size": WINDOW}),
    CacheRow("LongHeads", "longheads", {"chunk_size": BUDGET // 16, "num_chunks": 16}, wants_rope=True),
    CacheRow("Squeezed", "squeezed", {"clusters": 0.01, "sparsity": 0.95, "num_iters": 5}),
    CacheRow("Landmark (untrained)", "landmark", {"num_blocks": 32}),
    CacheRow("Recycled", "recycled", {"budget": BUDGET, "stride": 4}),
    CacheRow("StreamingLLM", "streaming", {"num_sink_tokens": 4, "window_size": BUDGET - 4}, reach=BUDGET - 4),
    CacheRow("SnapKV", "snapkv", {"budget": BUDGET}),
    CacheRow("SirLLM", "sirllm", {"num_entropy_tokens": BUDGET - 4}, turn=BUDGET),
    CacheRow(f"Window {WINDOW} (control)", "streaming", {"num_sink_tokens": 0, "window_size": WINDOW}, reach=WINDOW),
)
