"""SirLLM: the tokens that surprised the model are the ones it keeps.

Yao et al., "SirLLM: Streaming Infinite Retentive LLM" (arXiv 2405.12528).

The entropy of a token is `-log p(token | tokens before it)`: what the model could not have guessed. When a turn does
not fit any more, the first tokens and those of highest entropy stay, the same in every layer and head, and old
entropies fade a little with every turn.

With `rope`, what stays moves together, up to the turn that comes: only distances matter, so positions then count in the
cache.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from longctx.cache.base import LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.cache.positions import rerotate
from longctx.ops import topk_select
from longctx.prefill.policy import Rope


class SirLLMLayer(LongctxLayer):
    STATE: ClassVar[tuple[str, ...]] = ("raw",)
    # With `rope`, [batch, num_kv_heads, kept, head_dim]: the keys that have stayed, at position 0, so that moving them
    # again and again rounds them once.
    raw: Tensor | None

    def __init__(self, config: Any, layer_idx: int, *, rope: Rope | None, **shapes: Any) -> None:
        self.rope = rope
        super().__init__(config, layer_idx, **shapes)

    def keep(self, indices: Tensor, counts: Tensor | None = None, rows: Tensor | None = None) -> None:
        if self.rope is None:
            super().keep(indices, counts, rows)
            return
        assert self.keys is not None
        known = 0 if self.raw is None else self.raw.shape[2]
        at = self._positions()[:, known:]
        raw = rerotate(self.keys[:, :, known:], at, torch.zeros_like(at), self.rope)
        raw = raw if self.raw is None else torch.cat([self.raw, raw], dim=2)
        self.raw = raw.gather(2, indices[..., None].long().expand(-1, raw.shape[1], -1, raw.shape[3]))
        super().keep(indices, counts, rows)
        at = self._positions()
        self.keys.copy_(rerotate(self.raw, torch.zeros_like(at), at, self.rope))

    def _positions(self) -> Tensor:
        """Of the stored keys, one after the other up to the token that comes: int64 [1, slots]."""
        return torch.arange(self.seen - self.slots, self.seen, device=self.device)[None]


class SirLLMCache(LongctxCache):
    """A conversation that goes on for ever in `num_sink_tokens + num_entropy_tokens + num_recent_tokens` keys.

    Entropies need logits, which a cache does not see. So each turn is read by `read`, which also makes room, and
    generated tokens are noted by a `processor`.

    Args:
        config: `model.config`.
        num_sink_tokens: first tokens that always stay.
        num_entropy_tokens: tokens that stay for their entropy.
        num_recent_tokens: last tokens that always stay.
        decay: factor on all entropies at every turn: 1 for facts, 0.7 to 0.9 for talk, in the paper.
        rope: `longctx.integrations.transformers.find_rope(model)` counts positions in the cache, as in the paper: no
            token is ever farther away than the cache is long, so a conversation may exceed what the model was trained
            on. Costs the kept keys a second time. `None` keeps true positions.

    Within a turn all tokens are kept, and attended to exactly. Do not use it for one long prompt: what is forgotten is
    chosen before the question is known. Do not use `rope` for conversations as long as the model knows, where it
    matters when something was said.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.SirLLMCache(model.config, num_entropy_tokens=60)
        >>> text = torch.empty(1, 0, dtype=torch.long)
        >>> for _ in range(3):  # turns
        ...     text = torch.cat([text, torch.randint(1, 64, (1, 50))], dim=1)
        ...     cache.read(model, text)
        ...     options = {"logits_processor": [cache.processor()], "do_sample": False, **cache.as_argument()}
        ...     text = model.generate(text, max_new_tokens=5, **options)
        >>> cache.get_seq_length(), cache.layers[0].keys.shape[2]
        (164, 119)
    """

    name: ClassVar[str] = "sirllm"
    STATE: ClassVar[tuple[str, ...]] = ("entropy", "log_probs")
    entropy: Tensor | None  # float32 [batch, stored tokens]
    log_probs: Tensor | None  # float32 [batch, vocab], of the token that comes next

    def __init__(
        self,
        config: Any,
        *,
        num_sink_tokens: int = 4,
        num_entropy_tokens: int = 1020,
        num_recent_tokens: int = 0,
        decay: float = 1.0,
        rope: Rope | None = None,
    ) -> None:
        require("num_sink_tokens", num_sink_tokens, at_least=0)
        require("num_entropy_tokens", num_entropy_tokens, at_least=1)
        require("num_recent_tokens", num_recent_tokens, at_least=0)
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"longctx: `decay` must be above 0 and at most 1; got {decay}")
        self.num_sink_tokens, self.num_recent_tokens, self.decay = num_sink_tokens, num_recent_tokens, decay
        self.budget = num_sink_tokens + num_entropy_tokens + num_recent_tokens
        super().__init__(config, SirLLMLayer, {}, rope=rope)
        self.options = {
            "num_sink_tokens": num_sink_tokens,
            "num_entropy_tokens": num_entropy_tokens,
            "num_recent_tokens": num_recent_tokens,
            "decay": decay,
        }

    @torch.no_grad()
    def read(self, model: nn.Module, input_ids: Tensor, *, chunk_size: int = 1024) -> None:
        """Reads a turn, all but its last token, which `generate` reads: int64 `[batch, n]`, the past included.

        The turn is what `input_ids` has beyond the tokens of the cache. Logits are computed for `chunk_size` tokens at
        a time; before each chunk, tokens are forgotten down to the budget.
        """
        require("chunk_size", chunk_size, at_least=1)
        if self.entropy is not None:
            self.entropy = self.entropy * self.decay
        for chunk in input_ids[:, self.get_seq_length() : -1].split(chunk_size, dim=1):
            self._forget()
            if chunk.shape[1]:
                self._note(chunk, model(chunk, **self.as_argument(), use_cache=True).logits)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.entropy is not None:
            self.entropy, self.log_probs = self.entropy[:, : self.layers[0].slots], None

    def processor(self) -> LogitsProcessor:
        """For `generate`: notes the entropy of each token that is generated, and changes no logit."""
        return _Listener(self)

    def _note(self, tokens: Tensor, logits: Tensor) -> None:
        """Takes `tokens` [batch, n] and the logits [batch, n, vocab] that they led to."""
        if self.log_probs is None:
            # Nothing foretold the first token.
            self.log_probs = logits.new_full((logits.shape[0], logits.shape[2]), float("-inf"), dtype=torch.float32)
        log_probs = logits.float().log_softmax(dim=-1)
        foretold = torch.cat([self.log_probs[:, None], log_probs[:, :-1]], dim=1)
        entropy = -foretold.gather(2, tokens[..., None])[..., 0]
        self.entropy = entropy if self.entropy is None else torch.cat([self.entropy, entropy], dim=1)
        self.log_probs = log_probs[:, -1].clone()

    def _forget(self) -> None:
        stored = self.layers[0].slots
        if self.entropy is None or stored <= self.budget:
            return
        if self.entropy.shape[1] != stored:
            raise ValueError(
                f"longctx: SirLLM knows the entropy of {self.entropy.shape[1]} of {stored} tokens; pass each turn to "
                "`read`, and `processor()` to `generate`"
            )
        first, last = self.num_sink_tokens, self.num_recent_tokens
        indices, _ = topk_select(self.entropy, self.budget, num_first=first, num_last=last)
        for layer in self.layers:
            layer.keep(indices[:, None])
        self.entropy = self.entropy.gather(1, indices.long())


class _Listener(LogitsProcessor):
    def __init__(self, cache: SirLLMCache) -> None:
        self.cache = cache

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.cache._note(input_ids[:, -1:], scores[:, None])
        return scores
