"""MiniMax's lightning attention on `longctx.linear_attention`.

These layers do not go through `AttentionInterface`, so their class is exchanged: projections, masking, norm, gate and
the cache stay those of transformers, the loop over blocks and the loop over tokens become one call each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention as Stock
from transformers.models.minimax.modeling_minimax import apply_mask_to_padding_states

from longctx.ops import linear_attention, linear_attention_decode
from longctx.ops.linear_attention import state_dtype

# Calls of up to so many tokens on a cache take the decode kernel; from 32 on whole chunks are faster (measured).
MAX_DECODE_TOKENS = 16
# On a 16-bit state in the cache: the float32 state that it was rounded from.
WIDE = "_longctx_wide"


class LightningAttention(Stock):
    """`MiniMaxLightningAttention` with another `forward`: same weights, same cache, same results to rounding."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # what `cache` is called up to transformers 5.23
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        batch, seqlen, _ = hidden_states.shape
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        qkv = apply_mask_to_padding_states(qkv, attention_mask)
        qkv = qkv.view(batch, seqlen, self.num_attention_heads, 3 * self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.head_dim, dim=3)

        cache = cache if past_key_values is None else past_key_values
        stored = None if cache is None else cache.get_linear_cache(self.layer_idx)
        out, state = attend(q, k, v, log_decay(self), stored)
        stored = as_stored(state, torch.promote_types(v.dtype, self.slope_rate.dtype))
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, stored)

        out = self.norm(out.transpose(1, 2).reshape(batch, seqlen, -1))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * out), stored


def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output, and the state after the last token; `stored`, what the cache has, stays as it is."""
    if stored is None:
        return linear_attention(q, k, v, log_decay)
    before: Tensor = getattr(stored, WIDE, stored)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, before))
    if needs_grad or q.shape[2] > MAX_DECODE_TOKENS:
        return linear_attention(q, k, v, log_decay, initial_state=before.to(state_dtype(q.dtype)))
    state = before.to(state_dtype(q.dtype), copy=True)
    return linear_attention_decode(q, k, v, log_decay, state), state


def as_stored(state: Tensor, dtype: torch.dtype) -> Tensor:
    """The state in the dtype that stock layers keep and expect; a rounded one remembers what it was."""
    if state.dtype == dtype:
        return state
    stored = state.to(dtype)
    if stored.dtype.itemsize < state.dtype.itemsize:
        setattr(stored, WIDE, state)
    return stored


def log_decay(layer: nn.Module) -> Tensor:
    """`[num_heads]` from the layer's slopes; where a cast to 16 bits has rounded them, as they were before."""
    slopes: Tensor = layer.slope_rate  # type: ignore[assignment]
    if slopes.dtype.itemsize < 4:
        exact: Tensor = layer.get_slope_rate(device=slopes.device)  # type: ignore[operator]
        slopes = torch.where(exact.to(slopes.dtype) == slopes, exact, slopes.float())
    return -slopes.flatten()


def switch(model: nn.Module, *, on: bool) -> None:
    """Makes every lightning layer of a MiniMax model ours, or transformers' own again; of other models, nothing."""
    for module in model.modules():
        if type(module) is (Stock if on else LightningAttention):
            module.__class__ = LightningAttention if on else Stock


def count(model: nn.Module) -> int:
    """How many lightning layers a model has, whoever runs them."""
    return sum(isinstance(module, Stock) for module in model.modules())
