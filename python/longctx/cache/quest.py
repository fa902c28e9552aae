"""Quest: pages of keys, chosen by the highest score that any of their keys could have.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv 2406.10774).

The elementwise minimum and maximum of a page's keys bound every `q . k` of the page. So a query scores pages without
reading them, reads the `budget` keys of the best ones, and always the page it stands in.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.storage import Storage
from longctx.ops import gather_attention, page_scores, topk_select, update_pages
from longctx.prefill.grid import ceil_div


class QuestLayer(LongctxLayer):
    """The summary always knows the stored keys; a page that is cut by `crop` is made anew by the next token."""

    STATE: ClassVar[tuple[str, ...]] = ("summary",)
    summary: Storage | None  # [batch, num_kv_heads, pages, 2, head_dim]: minima, maxima

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        budget: int,
        page_size: int,
        num_dense_layers: int,
        head_reduce: str,
        max_cache_len: int | None,
    ) -> None:
        self.dense = layer_idx < num_dense_layers
        self.page_size, self.num_pages, self.head_reduce = page_size, budget // page_size, head_reduce
        super().__init__(config, layer_idx, max_cache_len)

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        if not self.dense:
            summary = self._pages(k.shape[2], context.start)
            update_pages(summary, k, context.start, self.page_size, seqused_k=context.seqused_k)

    def appending(self, end: int) -> dict[str, Any]:
        if self.dense:
            return {}
        summary = self._pages(end, self.slots if self.rows is None else self.rows)
        return {"summary": summary, "summary_page_size": self.page_size}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        if self.dense:
            return super().attend(q, k, v, context)
        seqlen_q, used = q.shape[2], context.seqused_k
        assert self.summary is not None
        summary = self.summary.data[:, :, : ceil_div(k.shape[2], self.page_size)]
        if used is None and k.shape[2] <= self.num_pages * self.page_size:
            return super().attend(q, k, v, context)
        self.count(self.num_pages * self.page_size, seqlen_q)
        if used is None and seqlen_q > 1:
            used = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
        page_size = None if used is None else self.page_size
        scores = page_scores(q, summary, head_reduce=self.head_reduce, seqused_k=used, page_size=page_size)  # type: ignore[arg-type]
        pages, counts = topk_select(scores, self.num_pages, lengths=self._visible(scores, used), num_last=1)
        options = {"block_size_k": self.page_size, "workspace": self.workspace(q), **context.score_options()}
        out, lse = gather_attention(q, k, v, pages, counts, **options)
        return context.weigh_sinks(out, lse)

    def _pages(self, end: int, start: int | Tensor) -> Tensor:
        """The summary of the pages of `end` keys; those that the keys from `start` on fall into may be written."""
        assert self.keys is not None
        num_pages = ceil_div(end, self.page_size)
        if self.summary is None:
            self.summary = Storage.like(self.keys[:, :, :0, None].expand(-1, -1, -1, 2, -1), num_pages)
            if self.max_cache_len is not None:
                self.mark_static(self.summary.data)
        if self.max_cache_len is None:
            first = start // self.page_size if isinstance(start, int) else 0
            known = min(self.summary.end, num_pages)
            self.summary = self.summary.writable(first, num_pages, known)
        return self.summary.data[:, :, :num_pages]

    def _visible(self, scores: Tensor, used: Tensor | None) -> Tensor | None:
        """Pages that begin at or before each token: int32 [batch, heads, seqlen_q]; None if all do."""
        if used is None:
            return None
        end = used[:, None] + torch.arange(1 - scores.shape[2], 1, dtype=torch.int32, device=used.device)
        pages: Tensor = ceil_div(end, self.page_size)
        return pages[:, None].expand(scores.shape[:3]).contiguous()


class QuestCache(LongctxCache):
    """Each token reads the `budget` keys of the best pages, its own page among them.

    Args:
        config: `model.config`.
        budget: keys a token reads per kv head; a multiple of `page_size`.
        page_size: keys of a page.
        num_dense_layers: the first layers, whose attention is spread widely, read everything.
        head_reduce: ``"group_max"``, ``"group_mean"`` or ``"group_sum"``: the query heads of a kv head choose together;
            ``"none"``: each for itself, as in the paper, and reads for itself.
        max_cache_len: static shapes.

    Keeps all keys, and 2 rows a page more. Approximate: pages are ranked by a bound. Do not use it for short contexts:
    below some thousand keys, reading everything is as fast.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.QuestCache(model.config, budget=64, num_dense_layers=1)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=3)
        >>> print(cache.stats())
        layer  tokens  keys read a token  of
            0       2              201.5  201.5
            1       2               64.0  201.5
    """

    name: ClassVar[str] = "quest"

    def __init__(
        self,
        config: Any,
        *,
        budget: int = 2048,
        page_size: int = 16,
        num_dense_layers: int = 2,
        head_reduce: str = "group_max",
        max_cache_len: int | None = None,
    ) -> None:
        require("page_size", page_size, at_least=1)
        require("budget", budget, at_least=page_size)
        require("num_dense_layers", num_dense_layers, at_least=0)
        if budget % page_size:
            raise ValueError(f"longctx: `budget` must be a multiple of `page_size` = {page_size}; got {budget}")
        if head_reduce not in ("none", "group_max", "group_mean", "group_sum"):
            raise ValueError(
                f"longctx: `head_reduce` must be 'none', 'group_max', 'group_mean' or 'group_sum'; got {head_reduce!r}"
            )
        options = {"budget": budget, "page_size": page_size, "num_dense_layers": num_dense_layers}
        super().__init__(config, QuestLayer, {**options, "head_reduce": head_reduce}, max_cache_len)
