"""InfLLM: far blocks of keys, found by the few keys that stand for them.

Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory"
(arXiv 2402.04617).

While a key is in the local window, the softmax it gets from the queries there is summed. A block that has left the
window is represented by the mean of its keys with the largest sums. A token reads the first tokens, the window, and
the blocks whose representative scores best, all heads choosing together.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.storage import Storage
from longctx.ops import attention_mass, gather_attention, page_scores, topk_select, update_pages


class InfLLMLayer(LongctxLayer):
    STATE: ClassVar[tuple[str, ...]] = ("mass", "summary")
    mass: Storage | None  # float32 [batch, num_kv_heads, n]: softmax that local queries gave each key
    summary: Storage | None  # [batch, num_kv_heads, blocks, head_dim], of the blocks behind the window

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        num_initial_tokens: int,
        window_size: int,
        block_size: int,
        num_blocks: int,
        num_representative: int,
        **shapes: Any,
    ) -> None:
        self.num_initial_tokens, self.window_size = num_initial_tokens, window_size
        self.block_size, self.num_blocks, self.num_representative = block_size, num_blocks, num_representative
        super().__init__(config, layer_idx, **shapes)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0 and self.is_initialized:
            raise NotImplementedError(
                "longctx: an InfLLM cache cannot be cropped, its keys hold what queries gave them; `fork` it before"
            )

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self._look(q, k, context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        seqlen_q = q.shape[2]
        summary = self._look(q, k, context)
        num_last = self.window_size + self.block_size - 1  # the window, and the block that has not quite left it
        self.count(self.num_initial_tokens + self.num_blocks * self.block_size + num_last, seqlen_q)
        scores = page_scores(q, summary, method="dot", head_reduce="all_sum")
        scores[..., : self.num_initial_tokens // self.block_size] = float("-inf")  # they are read anyway
        blocks, counts = topk_select(scores, self.num_blocks, lengths=self._behind_window(scores, k, context))
        forced = {"num_first": self.num_initial_tokens, "num_last": num_last}
        options: dict[str, Any] = {"block_size_k": self.block_size, **forced, **context.score_options()}
        out, lse = gather_attention(q, k, v, blocks, counts, **options)
        return context.weigh_sinks(out, lse)

    def _look(self, q: Tensor, k: Tensor, context: CallContext) -> Tensor:
        """Adds the softmax that the call's queries give, and sums up the blocks that have left the window."""
        # Rows of one length: the queries see nothing before the window of the first of them.
        first = max(0, k.shape[2] - self.window_size - q.shape[2]) if context.seqused_k is None else 0
        seen = attention_mass(q, k[:, :, first:], window_size_left=self.window_size - 1, **context.score_options())
        known = min(self.slots, 0 if self.mass is None else self.mass.end)
        if self.mass is None:
            self.mass = Storage.like(seen.new_empty(*k.shape[:2], 0), 0)
        self.mass = self.mass.writable(first, k.shape[2], known)
        self.mass.data[:, :, known : k.shape[2]] = 0.0
        self.mass.data[:, :, first : k.shape[2]] += seen.unflatten(1, (k.shape[1], -1)).mean(2)

        before, now = self._blocks_of(context.start), self._blocks_of(k.shape[2])
        if self.summary is None:
            self.summary = Storage.like(k, 0)
        start = before if context.seqused_k is None else 0
        self.summary = self.summary.writable(start, now, min(self.summary.end, now))
        summary = self.summary.data[:, :, :now]
        end = now * self.block_size
        used = None if context.seqused_k is None else self._blocks_of(context.seqused_k) * self.block_size
        if now > 0:
            update_pages(
                summary,
                k[:, :, :end],
                before * self.block_size,
                self.block_size,
                method="representative",
                key_scores=self.mass.data[:, :, :end],
                num_representative=self.num_representative,
                seqused_k=used,
            )
        return summary

    def _blocks_of(self, num_keys: Any) -> Any:
        """Blocks that lie wholly behind the window of the last of `num_keys` keys."""
        behind = num_keys - self.window_size
        return (behind.clamp(min=0) if isinstance(behind, Tensor) else max(behind, 0)) // self.block_size

    def _behind_window(self, scores: Tensor, k: Tensor, context: CallContext) -> Tensor | None:
        """Blocks behind the window of each token: int32 [batch, heads, seqlen_q]; None if all that have a score."""
        if context.seqused_k is None and scores.shape[2] == 1:
            return None
        used = context.seqused_k
        if used is None:
            used = torch.full((k.shape[0],), k.shape[2], dtype=torch.int32, device=k.device)
        end = used[:, None] + torch.arange(1 - scores.shape[2], 1, dtype=torch.int32, device=k.device)
        blocks: Tensor = self._blocks_of(end)
        return blocks[:, None].expand(scores.shape[:3]).contiguous()


class InfLLMCache(LongctxCache):
    """The first tokens, a window, and the best blocks of the rest.

    Args:
        config: `model.config`.
        num_initial_tokens: first tokens that are always read.
        window_size: last tokens that are always read.
        block_size: keys of a block.
        num_blocks: blocks that a token reads.
        num_representative: keys of a block that stand for it.

    Keeps all keys. Approximate. Positions are true ones, and each kv head has representatives of its own, the mean of
    what its query heads see; in the paper all far blocks stand at one distance, which lets a text exceed what the model
    was trained on. Cannot be cropped. Do not use it where the window alone is most of the text.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> options = {"num_initial_tokens": 4, "window_size": 32, "block_size": 8, "num_blocks": 4}
        >>> cache = longctx.cache.InfLLMCache(model.config, **options)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), past_key_values=cache, max_new_tokens=3)
        >>> print(cache.stats())
        layer  tokens  keys read a token  of
            0       2               75.0  201.5
            1       2               75.0  201.5
    """

    name: ClassVar[str] = "infllm"

    def __init__(
        self,
        config: Any,
        *,
        num_initial_tokens: int = 128,
        window_size: int = 4096,
        block_size: int = 128,
        num_blocks: int = 16,
        num_representative: int = 4,
    ) -> None:
        require("num_initial_tokens", num_initial_tokens, at_least=0)
        for name, value in (
            ("window_size", window_size),
            ("block_size", block_size),
            ("num_blocks", num_blocks),
            ("num_representative", num_representative),
        ):
            require(name, value, at_least=1)
        options = {
            "num_initial_tokens": num_initial_tokens,
            "window_size": window_size,
            "block_size": block_size,
            "num_blocks": num_blocks,
            "num_representative": num_representative,
        }
        super().__init__(config, InfLLMLayer, options)
