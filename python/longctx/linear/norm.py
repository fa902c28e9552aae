"""SimpleRMSNorm: a root mean square norm without weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import rms_norm


class SimpleRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` over the last dim.

    Statistics of 16-bit inputs are float32; the result has x's dtype. Differentiable.

    Source: Qin et al., "TransNormerLLM" (arXiv 2307.14995); eps as in its code.

    Example:
        >>> import torch
        >>> from longctx.linear import SimpleRMSNorm
        >>> SimpleRMSNorm()(torch.tensor([3.0, 4.0]))
        tensor([0.8485, 1.1314])
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
