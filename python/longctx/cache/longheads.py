"""LongHeads: each query head reads the few chunks of keys it chooses, as if they followed one another.

Lu et al., "LongHeads: Multi-Head Attention is Secretly a Long Context Processor" (arXiv 2402.10685).

Keys lie in chunks. A chunk is represented by its keys, averaged by how much they match its message, the mean of what
its tokens read of each other. A token reads the first chunk, the one before its own, its own, and those whose
representatives match its query best. All of them move together: positions count what is read, so that no token is
farther away than a model has seen, however long the text.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.positions import Turns, rerotate
from longctx.cache.refusals import Uncroppable, Unpadded
from longctx.cache.storage import Storage
from longctx.ops import attention, gather_attention, page_scores, summarize_pages, topk_select
from longctx.prefill.policy import Rope


class LongHeadsLayer(Uncroppable, Unpadded):
    NOT_CROPPED = "a LongHeads cache cannot be cropped, the queries of its chunks are gone"
    NOT_PADDED = "LongHeads takes no padding, its chunks are counted from the first token"
    STATE: ClassVar[tuple[str, ...]] = ("summary", "pending")
    summary: Storage | None  # [batch, num_q_heads, chunks, head_dim]
    pending: Tensor | None  # [batch, num_q_heads, < chunk_size, head_dim]: queries of the chunk in progress

    def __init__(
        self, config: Any, layer_idx: int, *, chunk_size: int, num_chunks: int, turns: Turns, **shapes: Any
    ) -> None:
        self.chunk_size, self.num_chunks, self.turns = chunk_size, num_chunks, turns
        super().__init__(config, layer_idx, **shapes)

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self._take(q, k, v, context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        self._take(q, k, v, context)
        assert self.summary is not None
        batch, heads, seqlen_q, _ = q.shape
        n, size = k.shape[2], self.chunk_size
        self.count(self.num_chunks * size, seqlen_q)
        position = torch.arange(n - seqlen_q, n, device=q.device)
        own = (position // size).int().expand(batch, heads, -1)
        q_inside = self._to(q, position, torch.zeros_like(position))
        scores = page_scores(q_inside, self.summary.data[:, :, : n // size], method="dot", softmax_scale=1.0)
        others = self.num_chunks - 1
        chunks, counts = topk_select(scores, others, lengths=own.contiguous(), num_first=1, num_last=1)
        chunks = pad(chunks, (0, 1), value=-1).scatter(3, counts[..., None].long(), own[..., None])
        # The own chunk, the last of counts + 1, stays where it is; the others move up to it, by whole chunks.
        rank = torch.arange(self.num_chunks, dtype=torch.int32, device=q.device)
        moved = (own - counts)[..., None] + rank - chunks
        out, lse = gather_attention(
            q,
            k,
            v,
            chunks,
            counts + 1,
            block_size_k=size,
            k_positions=moved,
            k_position_step=0,
            q_positions=torch.zeros(batch, seqlen_q, dtype=torch.int32, device=q.device),
            rope_cos_sin=self.turns.table(n // size + 1, q.device),
            workspace=self.workspace(q),
            **context.score_options(),
        )
        return context.weigh_sinks(out, lse)

    def _to(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return rerotate(x, old[None], new[None], self.turns.rope)

    def _take(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        """Sums up the chunks that the new keys complete."""
        n, size = k.shape[2], self.chunk_size
        queries = q if self.pending is None else torch.cat([self.pending, q], dim=2)
        first, last = (n - queries.shape[2]) // size, n // size
        self.summary = Storage.like(q, 0) if self.summary is None else self.summary
        self.summary = self.summary.writable(first, last, first)
        if last > first:
            self.summary.data[:, :, first:last] = self._represent(queries, k, v, first, last, context)
        self.pending = queries[:, :, (last - first) * size :].clone()

    def _represent(self, queries: Tensor, k: Tensor, v: Tensor, first: int, last: int, context: CallContext) -> Tensor:
        """[batch, num_q_heads, chunks, head_dim], of chunks `first` to `last`; `queries` begin with the first."""
        batch, size, num = k.shape[0], self.chunk_size, last - first
        scaling: dict[str, Any] = {"softmax_scale": context.softmax_scale}

        def in_chunks(x: Tensor) -> Tensor:
            chunks: Tensor = x.unflatten(2, (num, size)).transpose(1, 2).flatten(0, 1)
            return chunks

        rows = (queries[:, :, : num * size], *(x[:, :, first * size : last * size] for x in (k, v)))
        out, _ = attention(*(in_chunks(x) for x in rows), causal=False, **scaling)
        message = out.mean(2).unflatten(0, (batch, num)).transpose(1, 2)
        position = torch.arange(num * size, device=k.device)
        inside = self._to(rows[1], position + first * size, position % size)
        summary: Tensor = summarize_pages(inside, size, method="pooled", queries=message, **scaling)
        return summary


class LongHeadsCache(LongctxCache):
    """Chunks that each query head chooses, at positions of their own.

    Args:
        config: `model.config`.
        rope: `longctx.integrations.transformers.find_rope(model)`.
        chunk_size: tokens of a chunk; 256 in the paper.
        num_chunks: chunks that a head reads: the first, the token's own, the one before it, and the best others; 16 in
            the paper. `num_chunks * chunk_size` should not exceed the length the model was trained on.

    A prompt is read by dense attention at true positions. Keeps all keys, which move where they are read. Values must
    have the size of keys. Cannot be cropped; takes no padding. Do not use it where an answer is spread over more chunks
    than a head reads.

    Example:
        >>> import torch, longctx, transformers
        >>> from longctx.integrations.transformers import find_rope
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.LongHeadsCache(model.config, rope=find_rope(model), chunk_size=16, num_chunks=4)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=3)
        >>> print(cache.stats())
        layer  tokens  keys read a token  of
            0       2               64.0  201.5
            1       2               64.0  201.5
    """

    name: ClassVar[str] = "longheads"

    def __init__(self, config: Any, *, rope: Rope, chunk_size: int = 256, num_chunks: int = 16) -> None:
        require("chunk_size", chunk_size, at_least=1)
        require("num_chunks", num_chunks, at_least=3)
        options = {"chunk_size": chunk_size, "num_chunks": num_chunks}
        super().__init__(config, LongHeadsLayer, options, turns=Turns(rope, chunk_size))
