"""TransNormerBlock: a layer of TransNormerLLM, token mixer and channel mixer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from longctx.linear.glu import SGLU
from longctx.linear.lightning import LightningAttention, LightningState
from longctx.linear.norm import SimpleRMSNorm


class TransNormerBlock(nn.Module):
    """`x = x + attention(norm(x))`, then `x = x + glu(norm(x))`, with `LightningAttention`, `SGLU`, `SimpleRMSNorm`.

    Args:
        hidden_size: of the inputs and outputs.
        intermediate_size: inside the SGLU.
        num_heads, log_decay, num_kv_heads, head_dim, use_lrpe: of the attention.
        bias: of all projections.
        eps: of all norms.

    Called like `LightningAttention`: `block(x, state)` returns the output and the state after it, `decode` changes the
    state in place, `new_state` makes the first. The numbers agree to rounding, and `attention_mask` marks padding.

    Source: Qin et al., "TransNormerLLM" (arXiv 2307.14995).

    Example:
        >>> import torch
        >>> from longctx.linear import TransNormerBlock, transnormer_code_log_decay
        >>> log_decay = transnormer_code_log_decay(num_heads=4, layer_idx=0, num_layers=8)
        >>> block = TransNormerBlock(32, 96, 4, log_decay, use_lrpe=True).requires_grad_(False)
        >>> x = torch.randn(2, 100, 32)
        >>> whole, _ = block(x)
        >>> prompt, state = block(x[:, :99])
        >>> last = block.decode(x[:, 99:], state)
        >>> torch.allclose(torch.cat([prompt, last], dim=1), whole, atol=1e-5)
        True
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        log_decay: Tensor,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_lrpe: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.attention_norm = SimpleRMSNorm(eps)
        self.attention = LightningAttention(
            hidden_size,
            num_heads,
            log_decay,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            use_lrpe=use_lrpe,
            bias=bias,
            eps=eps,
        )
        self.glu_norm = SimpleRMSNorm(eps)
        self.glu = SGLU(hidden_size, intermediate_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: LightningState | None = None,
        *,
        attention_mask: Tensor | None = None,
        num_segments: int = 0,
    ) -> tuple[Tensor, LightningState]:
        normed = self.attention_norm(x)
        mixed, after = self.attention(normed, state, attention_mask=attention_mask, num_segments=num_segments)
        return self._channels(x + mixed), after

    def decode(self, x: Tensor, state: LightningState, *, attention_mask: Tensor | None = None) -> Tensor:
        """The outputs of the next tokens x `[batch, num_tokens, hidden_size]`; `state` takes them in, in place."""
        mixed = self.attention.decode(self.attention_norm(x), state, attention_mask=attention_mask)
        return self._channels(x + mixed)

    def new_state(self, batch: int) -> LightningState:
        """The state before the first token."""
        return self.attention.new_state(batch)

    def _channels(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.glu(self.glu_norm(x)))
