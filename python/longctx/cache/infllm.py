"""InfLLM: far blocks of keys, found by the few keys that stand for them.

Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory"
(arXiv 2402.04617).

While a key is in the local window, the softmax it gets from the queries there is summed. A block that has left the
window is represented by the mean of its keys with the largest sums. A token reads the first tokens, the window, and
the blocks whose representative scores best, all heads choosing together.

What lies behind the window is simply far: with `rope` all of it stands at one distance, the window's length, and so do
representatives while blocks are chosen. Keys are stored where they are, and turned back to position 0 where they are
read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.positions import Turns, rerotate, token_positions
from longctx.cache.refusals import Uncroppable
from longctx.cache.storage import Storage
from longctx.ops import attention_mass, gather_attention, merge_states, page_scores, topk_select, update_pages
from longctx.prefill.policy import Rope


class InfLLMLayer(Uncroppable):
    NOT_CROPPED = "an InfLLM cache cannot be cropped, its keys hold what queries gave them"
    STATE: ClassVar[tuple[str, ...]] = ("mass", "summary")
    mass: Storage | None  # float32 [batch, num_kv_heads, n]: softmax that local queries gave each key
    # [batch, num_kv_heads, blocks, head_dim], of the blocks behind the window; with `turns`, at position 0
    summary: Storage | None

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
        turns: Turns | None,
        **shapes: Any,
    ) -> None:
        self.num_initial_tokens, self.window_size = num_initial_tokens, window_size
        self.block_size, self.num_blocks, self.num_representative = block_size, num_blocks, num_representative
        self.turns = turns
        super().__init__(config, layer_idx, **shapes)

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self._look(q, k, context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        summary = self._look(q, k, context)
        position = token_positions(q, k, context)
        behind = self._blocks_of(position + 1).int()  # blocks that lie wholly behind the window of each token
        num_last = self.window_size + self.block_size - 1  # the window, and the block that has not quite left it
        self.count(self.num_initial_tokens + self.num_blocks * self.block_size + num_last, q.shape[2])
        q_far = q
        if self.turns is not None:
            q_far = rerotate(q, position, torch.full_like(position, self.window_size), self.turns.rope)
        scores = page_scores(q_far, summary, method="dot", head_reduce="all_sum")
        scores[..., : self.num_initial_tokens // self.block_size] = float("-inf")  # they are read anyway
        blocks, counts = topk_select(scores, self.num_blocks, lengths=behind[:, None].contiguous())
        options: dict[str, Any] = {"block_size_k": self.block_size, "num_first": self.num_initial_tokens}
        options |= {"workspace": self.workspace(q), **context.score_options()}
        if self.turns is None:
            out, lse = gather_attention(q, k, v, blocks, counts, num_last=num_last, **options)
            return context.weigh_sinks(out, lse)
        blocks = pad(blocks, (0, 1), value=-1).scatter(3, counts[..., None].long(), behind[:, None, :, None])
        # To the far keys, a token stands at the last one behind its window.
        options["seqused_k"] = (position[:, -1] + 1 - self.window_size).clamp(min=0).int()
        table = self.turns.table(k.shape[2], q.device)
        zeros = torch.zeros_like(position, dtype=torch.int32)
        far = gather_attention(q_far, k, v, blocks, counts + 1, q_positions=zeros, rope_cos_sin=table, **options)
        options |= {"num_first": 0, "num_last": self.window_size, "seqused_k": context.seqused_k}
        near = gather_attention(q, k, v, blocks[..., :0], **options)
        out, lse = merge_states(*(torch.stack(parts) for parts in zip(far, near, strict=True)))
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
        # Rows may complete fewer blocks than this; no token reads the others before they are complete, and made again.
        most = 0 if self.turns is None else min(-(-q.shape[2] // self.block_size), now)
        if self.summary is None:
            self.summary = Storage.like(k, 0)
        start = before if context.seqused_k is None else 0
        self.summary = self.summary.writable(start, now + most, min(self.summary.end, now))
        if self.turns is not None and now > 0 and (isinstance(before, Tensor) or now > before):
            block = torch.as_tensor(before, device=k.device).expand(k.shape[0])[:, None]
            self._represent(block + torch.arange(most, device=k.device), k, self.turns)
        elif self.turns is None and now > 0:
            update_pages(
                self.summary.data[:, :, :now],
                k[:, :, : now * self.block_size],
                before * self.block_size,
                self.block_size,
                method="representative",
                key_scores=self.mass.data[:, :, : now * self.block_size],
                num_representative=self.num_representative,
                seqused_k=None if context.seqused_k is None else self._blocks_of(context.seqused_k) * self.block_size,
            )
        return self.summary.data[:, :, :now]

    def _represent(self, blocks: Tensor, k: Tensor, turns: Turns) -> None:
        """What `update_pages` makes of `blocks` [batch, n], of keys at position 0."""
        assert self.mass is not None
        assert self.summary is not None
        batch, heads, n, dim = k.shape
        first = blocks[..., None] * self.block_size
        at = (first + torch.arange(self.block_size, device=k.device)).clamp(max=n - 1).flatten(1)
        mass = self.mass.data.gather(2, at[:, None].expand(-1, heads, -1)).unflatten(2, (-1, self.block_size))
        best, _ = topk_select(mass, min(self.num_representative, self.block_size))
        at = (first[:, None] + best).clamp(max=n - 1).flatten(2)
        keys = k.gather(2, at[..., None].expand(-1, -1, -1, dim)).flatten(0, 1)[:, None]
        keys = rerotate(keys, at.flatten(0, 1), torch.zeros_like(at).flatten(0, 1), turns.rope)
        made = keys.view(batch, heads, *best.shape[2:], dim).float().mean(3).to(k.dtype)
        row = torch.arange(batch, device=k.device)[:, None]
        self.summary.data.transpose(1, 2).index_put_((row, blocks), made.transpose(1, 2))

    def _blocks_of(self, num_keys: Any) -> Any:
        """Blocks that lie wholly behind the window of the last of `num_keys` keys."""
        behind = num_keys - self.window_size
        return (behind.clamp(min=0) if isinstance(behind, Tensor) else max(behind, 0)) // self.block_size


class InfLLMCache(LongctxCache):
    """The first tokens, a window, and the best blocks of the rest.

    Args:
        config: `model.config`.
        num_initial_tokens: first tokens that are always read.
        window_size: last tokens that are always read.
        block_size: keys of a block.
        num_blocks: blocks that a token reads.
        num_representative: keys of a block that stand for it.
        rope: `longctx.integrations.transformers.find_rope(model)` puts all that lies behind the window at one distance,
            as in the paper: `window_size`. So a text may exceed what the model was trained on. `None` keeps true
            positions.

    Keeps all keys; with `rope`, also `4 * head_dim` bytes a token, once for all layers. Approximate. Each kv head has
    representatives of its own, by the mean of what its query heads see. A prompt is read at true positions. Cannot be
    cropped. Do not use it where the window alone is most of the text, nor `rope` where the order of what is far
    matters: of two far tokens none is nearer.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> options = {"num_initial_tokens": 4, "window_size": 32, "block_size": 8, "num_blocks": 4}
        >>> cache = longctx.cache.InfLLMCache(model.config, **options)
        >>> tokens = model.generate(torch.ones(1, 200, dtype=torch.long), **cache.as_argument(), max_new_tokens=3)
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
        rope: Rope | None = None,
    ) -> None:
        options = {
            "window_size": window_size,
            "block_size": block_size,
            "num_blocks": num_blocks,
            "num_representative": num_representative,
        }
        for name, value in options.items():
            require(name, value, at_least=1)
        require("num_initial_tokens", num_initial_tokens, at_least=0)
        options["num_initial_tokens"] = num_initial_tokens
        super().__init__(config, InfLLMLayer, options, turns=None if rope is None else Turns(rope, -1))
