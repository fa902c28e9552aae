"""LightningAttention: gated linear attention with a decay per head, as in TransNormerLLM and MiniMax.

Qin et al., "TransNormerLLM" (arXiv 2307.14995); MiniMax-01 (arXiv 2501.08313).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid, silu

from longctx.linear.norm import SimpleRMSNorm
from longctx.linear.rotary import LRPE
from longctx.ops import linear_attention, linear_attention_decode

Variant = Literal["transnormer", "minimax"]


@dataclass(kw_only=True, eq=False)
class LightningState:
    """What a layer remembers of the tokens so far: its size does not depend on their number.

    `kv` is the state of `longctx.linear_attention`, float32 (float64 beside float64) `[batch, num_heads, key_dim,
    head_dim]`; `key_dim` is `head_dim`, or twice that with LRPE. `num_tokens` int64 `[batch]` counts the tokens of
    each sequence: its next token stands at that position.

    Example:
        >>> import torch
        >>> from longctx.linear import LightningAttention, retnet_log_decay
        >>> layer = LightningAttention(32, 4, retnet_log_decay(4)).requires_grad_(False)
        >>> _, prompt = layer(torch.randn(1, 100, 32))
        >>> branches = [prompt.clone() for _ in range(2)]  # two continuations of one prompt
        >>> outs = [layer.decode(torch.randn(1, 1, 32), branch) for branch in branches]
        >>> prompt.num_tokens, branches[0].num_tokens
        (tensor([100]), tensor([101]))
    """

    kv: Tensor
    num_tokens: Tensor

    def clone(self) -> LightningState:
        """A copy to branch off from: decode changes a state in place."""
        return LightningState(kv=self.kv.clone(), num_tokens=self.num_tokens.clone())


class LightningAttention(nn.Module):
    """Linear attention between its projections: a token mixer for sequences of any length.

    `transnormer`: `out_proj(u * norm(linear_attention(silu(q), silu(k), v)))` with SimpleRMSNorm.
    `minimax`: `out_proj(sigmoid(u) * norm(linear_attention(silu(q), silu(k), silu(v))))` with RMSNorm.
    q, k, v, u are linear in x, the norm is over all heads together, and scores are not scaled.

    Args:
        hidden_size: of the inputs and outputs.
        num_heads: query heads; so many decays.
        log_decay: float32 `[num_heads]`, `<= 0`, from a function of `longctx.linear` (`minimax_log_decay`,
            `transnormer_code_log_decay`, ...). Kept as a buffer, which stays float32 when
            the module is cast to 16 bits.
        num_kv_heads: heads of k and v; divides `num_heads`, its default.
        head_dim: default `hidden_size // num_heads`.
        variant: "transnormer" or "minimax".
        use_lrpe: encode positions of q and k by `LRPE` (TransNormerLLM: first layer only).
        bias: of the projections.
        eps: of the norm.

    Three ways to the same numbers, to rounding:
        `layer(x)` and `layer(x, state)`: x `[batch, seqlen, hidden_size]` from the start, or after the tokens of
        `state`. Returns the output, like x, and the state after it; `state` itself is unchanged.
        `layer.decode(x, state)`: one or a few tokens, `state` changed **in place**; returns the output alone.
        `layer.new_state(batch)`: the state before the first token.

    Tokens where `attention_mask` (bool `[batch, seqlen]`, or integers) is zero are padding, on any side: they add
    nothing to the state, do not age it and have no position, so all others get what they would get without them.

    Each output is a function of the inputs up to it. Cut at multiples of `longctx.ops.LINEAR_CHUNK_SIZE` with
    `num_segments=1`, attention itself gives the same bits as in one call; projections do as far as PyTorch's matrix
    product does.

    It trains: the output is differentiable in x, the parameters and `state.kv`, and `state` in the same. `decode`
    changes a state in place and has no gradient: it raises NotImplementedError unless it runs under `torch.no_grad()`
    or without parameters that require a gradient.

    Example:
        >>> import torch
        >>> from longctx.linear import LightningAttention, transnormer_code_log_decay
        >>> log_decay = transnormer_code_log_decay(num_heads=4, layer_idx=0, num_layers=8)
        >>> layer = LightningAttention(32, 4, log_decay).requires_grad_(False)
        >>> x = torch.randn(2, 100, 32)
        >>> whole, _ = layer(x)
        >>> first, state = layer(x[:, :64])  # chunked prefill
        >>> rest, state = layer(x[:, 64:99], state)
        >>> last = layer.decode(x[:, 99:], state)
        >>> torch.allclose(torch.cat([first, rest, last], dim=1), whole, atol=1e-5)
        True
        >>> state.kv.shape, state.num_tokens
        (torch.Size([2, 4, 8, 8]), tensor([100, 100]))
    """

    log_decay: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        log_decay: Tensor,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        variant: Variant = "transnormer",
        use_lrpe: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.variant = hidden_size, num_heads, variant
        _require(num_heads >= 1, "num_heads", "be at least 1", num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        divides = self.num_kv_heads >= 1 and num_heads % self.num_kv_heads == 0
        _require(divides, "num_kv_heads", f"divide num_heads = {num_heads}", num_kv_heads)
        if head_dim is None:
            rule = f"be a multiple of num_heads = {num_heads} where head_dim is not given"
            _require(hidden_size % num_heads == 0, "hidden_size", rule, hidden_size)
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        _require(self.head_dim >= 1, "head_dim", "be at least 1", self.head_dim)
        _require(variant in get_args(Variant), "variant", f"be one of {', '.join(get_args(Variant))}", repr(variant))
        rule = f"be float32 of shape [num_heads] = [{num_heads}]"
        legal = tuple(log_decay.shape) == (num_heads,) and log_decay.dtype == torch.float32
        _require(legal, "log_decay", rule, f"{log_decay.dtype} {list(log_decay.shape)}")
        if not log_decay.is_meta:
            _require(bool((log_decay <= 0).all()), "log_decay", "be <= 0", log_decay.tolist())

        self.register_buffer("log_decay", log_decay.detach().clone())
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.widths = (width, kv_width, kv_width, width)  # of q, k, v, u
        self.qkvu_proj = nn.Linear(hidden_size, sum(self.widths), bias=bias)
        self.lrpe = LRPE(self.num_kv_heads, self.head_dim) if use_lrpe else None
        self.norm = SimpleRMSNorm(eps) if variant == "transnormer" else nn.RMSNorm(width, eps)
        self.out_proj = nn.Linear(width, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: LightningState | None = None,
        *,
        attention_mask: Tensor | None = None,
        num_segments: int = 0,
    ) -> tuple[Tensor, LightningState]:
        state, mask = self._checked(x, state), _checked_mask(x, attention_mask)
        q, k, v, u = self._project(x, state, mask)
        log_decay = self._log_decay(mask)
        out, kv = linear_attention(q, k, v, log_decay, initial_state=state.kv, num_segments=num_segments)
        return self._output(out, u), LightningState(kv=kv, num_tokens=state.num_tokens + _num_tokens(x, mask))

    def decode(self, x: Tensor, state: LightningState, *, attention_mask: Tensor | None = None) -> Tensor:
        """The outputs of the next tokens x `[batch, num_tokens, hidden_size]`; `state` takes them in, in place."""
        state, mask = self._checked(x, state), _checked_mask(x, attention_mask)
        q, k, v, u = self._project(x, state, mask)
        out = linear_attention_decode(q, k, v, self._log_decay(mask), state.kv)
        state.num_tokens += _num_tokens(x, mask)
        return self._output(out, u)

    def new_state(self, batch: int) -> LightningState:
        """The state before the first token, on the device of the layer."""
        weight = self.out_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return LightningState(
            kv=torch.zeros(batch, *self._state_shape, dtype=wide, device=weight.device),
            num_tokens=torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    @property
    def _state_shape(self) -> tuple[int, int, int]:
        key_dim = self.head_dim if self.lrpe is None else 2 * self.head_dim
        return self.num_heads, key_dim, self.head_dim

    def _checked(self, x: Tensor, state: LightningState | None) -> LightningState:
        legal = x.dim() == 3 and x.shape[2] == self.hidden_size
        rule = f"have shape [batch, seqlen, hidden_size] = [*, *, {self.hidden_size}]"
        _require(legal, "x", rule, list(x.shape))
        if state is None:
            return self.new_state(x.shape[0])
        shape = (x.shape[0], *self._state_shape)
        rule = f"have shape [batch, num_heads, key_dim, head_dim] = {list(shape)}"
        _require(tuple(state.kv.shape) == shape, "state.kv", rule, list(state.kv.shape))
        tokens = state.num_tokens
        legal = tuple(tokens.shape) == shape[:1] and tokens.dtype == torch.int64
        rule = f"be int64 of shape [batch] = [{x.shape[0]}]"
        _require(legal, "state.num_tokens", rule, f"{tokens.dtype} {list(tokens.shape)}")
        return state

    def _log_decay(self, mask: Tensor | None) -> Tensor:
        """`[num_heads]`, or `[batch, num_heads, seqlen]` where padding must not age the state."""
        return self.log_decay if mask is None else torch.where(mask[:, None], self.log_decay[:, None], 0.0)

    def _project(self, x: Tensor, state: LightningState, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v [batch, heads, seqlen, head_dim] (keys twice as wide with LRPE) and u [batch, seqlen, width].

        All are 0 at padding.
        """
        projected = cast(Tensor, self.qkvu_proj(x))
        if mask is not None:
            projected = projected.masked_fill(~mask[..., None], 0.0)
        parts = projected.split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts[:3])
        q, k = silu(q), silu(k)
        if self.variant == "minimax":
            v = silu(v)
        if self.lrpe is not None:
            steps = torch.arange(x.shape[1], device=x.device) if mask is None else mask.cumsum(1) - 1
            positions = state.num_tokens[:, None] + steps
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        return q, k, v, parts[3]

    def _output(self, out: Tensor, u: Tensor) -> Tensor:
        """From heads [batch, num_heads, seqlen, head_dim] to [batch, seqlen, hidden_size]."""
        normed = self.norm(out.transpose(1, 2).flatten(2))
        gate = sigmoid(u) if self.variant == "minimax" else u
        return cast(Tensor, self.out_proj(gate * normed))

    def _apply(self, fn: Any, recurse: bool = True) -> LightningAttention:
        # A decay rounded to 16 bits is another decay.
        log_decay = self.log_decay
        super()._apply(fn, recurse)
        if self.log_decay.dtype.itemsize < 4:
            self.log_decay = log_decay.to(self.log_decay.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{self.hidden_size}, {heads}, variant={self.variant!r}"


def _checked_mask(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """As bool."""
    if attention_mask is None:
        return None
    legal = attention_mask.shape == x.shape[:2] and not attention_mask.is_floating_point()
    rule = f"be bool or integers of shape [batch, seqlen] = {list(x.shape[:2])}"
    _require(legal, "attention_mask", rule, f"{attention_mask.dtype} {list(attention_mask.shape)}")
    return attention_mask.bool()


def _num_tokens(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many tokens of each sequence are not padding."""
    return x.shape[1] if mask is None else mask.sum(1)


def _require(ok: bool, argument: str, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"longctx::LightningAttention: `{argument}` must {rule}; got {got}")
