"""SGLU: the channel mixer of TransNormerLLM."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class SGLU(nn.Module):
    """Simple gated linear unit: `W_down((W_gate x) * (W_up x))`, without an activation.

    Maps `[.., hidden_size]` to `[.., hidden_size]` through `intermediate_size`. Differentiable.

    Source: Qin et al., "TransNormerLLM" (arXiv 2307.14995).

    Example:
        >>> import torch
        >>> from longctx.linear import SGLU
        >>> x = torch.randn(2, 5, 8)
        >>> glu = SGLU(hidden_size=8, intermediate_size=24)
        >>> glu(x).shape, torch.allclose(glu(-x), glu(x), atol=1e-6)
        (torch.Size([2, 5, 8]), True)
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(self.gate_proj(x) * self.up_proj(x)))
