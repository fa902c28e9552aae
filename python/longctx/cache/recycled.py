"""Recycled Attention: the keys that a full step found serve the steps after it.

Xu et al., "Recycled Attention: Efficient inference for long-context language models" (arXiv 2411.05787).

Neighbouring tokens attend to much the same keys. So most steps attend to the `budget` keys that the last full step gave
most of its softmax, and to all tokens since. A full step comes every `stride` tokens, or as soon as the queries have
turned away from those of the last one.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.ops import attention, attention_mass, gather_attention, topk_select


class RecycledLayer(LongctxLayer):
    STATE: ClassVar[tuple[str, ...]] = ("indices", "q_full")
    PLAIN: ClassVar[tuple[str, ...]] = (*LongctxLayer.PLAIN, "since")
    indices: Tensor | None  # int32 [batch, num_kv_heads, 1, budget], of the last full step
    q_full: Tensor | None  # [batch, num_q_heads, head_dim], its last query

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        budget: int,
        stride: int,
        similarity: float | None,
        reduce: str,
        **shapes: Any,
    ) -> None:
        self.budget, self.stride, self.similarity, self.reduce = budget, stride, similarity, reduce
        super().__init__(config, layer_idx, **shapes)

    def reset(self) -> None:
        super().reset()
        self.since = 0  # tokens after the last full step

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self.indices = self.q_full = None  # the first token after it is a full step

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        seqlen_q = q.shape[2]
        if self.indices is None or self.since + seqlen_q > self.stride or self._turned_away(q):
            return self._full_step(q, k, v, context)
        self.since += seqlen_q
        self.count(self.budget + self.since, seqlen_q)
        indices = self.indices.expand(-1, -1, seqlen_q, -1)
        options = {"num_last": self.since, "workspace": self.workspace(q), **context.score_options()}
        out, lse = gather_attention(q, k, v, indices, **options)
        return context.weigh_sinks(out, lse)

    def _full_step(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        self.count(k.shape[2], q.shape[2])
        out, lse = attention(q, k, v, **context.score_options())
        mass = attention_mass(q, k, lse, **context.score_options()).unflatten(1, (k.shape[1], -1))
        mass = mass.mean(2) if self.reduce == "mean" else mass.amax(2)
        used = context.seqused_k
        lengths = None if used is None else used[:, None].expand(mass.shape[:2]).contiguous()
        self.indices = topk_select(mass, self.budget, lengths=lengths)[0][:, :, None]
        self.q_full, self.since = q[:, :, -1].clone(), 0
        return context.weigh_sinks(out, lse)

    def _turned_away(self, q: Tensor) -> bool:
        """Whether the queries of any row are no longer like those of the full step, on average over heads."""
        if self.similarity is None or self.q_full is None:
            return False
        alike = cosine_similarity(q.float(), self.q_full[:, :, None].float(), dim=-1).mean(1)
        return bool((alike < self.similarity).any())

    def cropped(self) -> None:
        self.indices = self.q_full = None


class RecycledCache(LongctxCache):
    """A full step every `stride` tokens; between them `budget` keys a kv head and the tokens since.

    Args:
        config: `model.config`.
        budget: keys that a full step hands on.
        stride: a full step comes at the latest after so many tokens; 10 to 50 in the paper.
        similarity: a full step comes also when the mean cosine of the queries with those of the last full step falls
            below this. Decided layer by layer; reads a value on the host. `None`: by `stride` alone.
        reduce: how the query heads of a kv head vote, ``"mean"`` or ``"max"``.

    Keeps all keys, so it saves time and no memory; full steps are exact. Do not use it where the text jumps from place
    to place at every token.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.RecycledCache(model.config, budget=50, stride=4)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=6)
        >>> print(cache.stats())  # one full step, four of 51 to 54 keys
        layer  tokens  keys read a token  of
            0       5               82.2  203.0
            1       5               82.2  203.0
    """

    name: ClassVar[str] = "recycled"

    def __init__(
        self,
        config: Any,
        *,
        budget: int = 2048,
        stride: int = 20,
        similarity: float | None = None,
        reduce: str = "mean",
    ) -> None:
        require("budget", budget, at_least=1)
        require("stride", stride, at_least=1)
        if reduce not in ("mean", "max"):
            raise ValueError(f"longctx: `reduce` must be 'mean' or 'max'; got {reduce!r}")
        options = {"budget": budget, "stride": stride, "similarity": similarity, "reduce": reduce}
        super().__init__(config, RecycledLayer, options)
