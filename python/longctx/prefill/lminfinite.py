"""LM-Infinite: a Lambda-shaped mask with a ceiling on distance.

Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models" (arXiv 2308.16137).

A query sees the last `window_size` keys where they are, and the first `num_global_tokens` keys as if they were
`window_size` away: a model never meets a distance it was not trained on. The two branches rotate q and k differently,
so each is one attention call, and their states are merged exactly by lse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longctx.ops import attention, merge_states
from longctx.prefill.ashape import AShape, sinks_and_window
from longctx.prefill.cost import Lengths
from longctx.prefill.grid import Rows, Sequences, token_rows
from longctx.prefill.policy import AttentionContext, Pattern, Policy, Rope


@dataclass(frozen=True, kw_only=True)
class LMInfinite(Policy):
    """`window_size` is the length the model was trained on: 4096 for Llama 2; the authors use 10 to 100 global tokens.

    Needs `rope` in the context, and `positions` where keys do not count from 0.
    """

    name: ClassVar[str] = "lminfinite"
    num_global_tokens: int = 10
    window_size: int = 4096

    def __post_init__(self) -> None:
        self._require("num_global_tokens", self.num_global_tokens >= 0, "be >= 0")
        self._require("window_size", self.window_size >= 1, "be >= 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rope"})

    @property
    def changes_logits(self) -> bool:
        return True

    def least_cost(self, lengths: Lengths) -> float:
        return lengths.kept(self.window_size)  # all of it: no key is far, and nothing moves

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        mask = AShape(num_sink_tokens=self.num_global_tokens, window_size=self.window_size)
        self._require_causal(context)
        return mask.select(q, k, context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        if context.rope is None:
            raise ValueError("longctx::lminfinite: `rope` must be given in the context; got None")
        self._require_causal(context)
        far, near = sinks_and_window(q, k, context, self.num_global_tokens, self.window_size)
        # The ranges say all that a query sees; `sinks` count once, after the merge.
        options = {**context.options(), "causal": False, "window_size_left": -1, "window_size_right": -1}
        options.update(seqused_k=None, sinks=None)
        states = [attention(q, k, v, **{**options, "key_ranges": near[:, None].int()})]
        if self.num_global_tokens > 0:
            q_positions, k_positions = _positions(q, k, context)
            q_far = rerotate(q, q_positions, torch.full_like(q_positions, self.window_size), context.rope)
            if context.key_ranges is None and context.cu_seqlens_k is None:  # then only the first keys are seen
                keys = slice(0, self.num_global_tokens)
                k, v, k_positions = k[:, :, keys], v[:, :, keys], k_positions[:, keys]
            k_far = rerotate(k, k_positions, torch.zeros_like(k_positions), context.rope)
            states.append(attention(q_far, k_far, v, **{**options, "key_ranges": far[:, None].int()}))
        out, lse = merge_states(torch.stack([o for o, _ in states]), torch.stack([s for _, s in states]))
        if context.sinks is not None:
            out = (out * torch.sigmoid(lse - context.sinks[:, None])[..., None]).to(out.dtype)
        return out, lse


def _positions(q: Tensor, k: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """RoPE positions of the queries [batch, seqlen_q] and of the keys [batch, seqlen_k]."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    rows = token_rows(context, shape, q.device)
    if context.positions is not None:
        keys = context.positions.long().expand(k.shape[0], -1)
        own = (rows.k_begin + rows.position).clamp(0, max(k.shape[2] - 1, 0))
        return keys.gather(1, own), keys
    seqs = Sequences.of(context, shape, q.device)
    if not seqs.packed:
        return rows.position, torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1)
    return rows.position, Rows.of(seqs.of_keys(), k.shape[2], 1).position[:, : k.shape[2]]


def rerotate(x: Tensor, old: Tensor, new: Tensor, rope: Rope) -> Tensor:
    """`x` [batch, heads, n, dim], rotated to positions `old` [batch, n], as it would be at positions `new`."""
    cos, sin = (t[:, None].float() for t in rope(old))
    rotated, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
    # The inverse of a rotation scaled by c is its transpose divided by c ** 2.
    plain = (rotated * cos - _rotate_half(rotated) * sin) / (cos * cos + sin * sin)
    cos, sin = (t[:, None].float() for t in rope(new))
    rotated = plain * cos + _rotate_half(plain) * sin
    return torch.cat([rotated.to(x.dtype), rest], -1)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
