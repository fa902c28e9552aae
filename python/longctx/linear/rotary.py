"""LRPE: relative positions for linear attention, whose scores are never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LRPE(nn.Module):
    """Linearized relative positional encoding: `x_t -> [x_t cos(theta t), x_t sin(theta t)]`, twice as wide.

    Applied to queries and keys, `q'_s . k'_t = sum_i q_si k_ti cos(theta_i (s - t))`: positions enter by their
    difference alone. `theta` is a parameter `[num_heads, 1, head_dim]`, initially
    `base^(-2 i / (num_heads * head_dim))` where `i` counts through all heads. Differentiable in x and theta.

    `theta` stays float32 when the module is cast to 16 bits: rounded angles are other angles far out.

    With grouped queries, `num_heads` is that of the keys: query heads share the angles of the key head they read.

    Args of the call:
        x: `[batch, heads, seqlen, head_dim]`; `heads` is a multiple of `num_heads`.
        positions: integers `[seqlen]` or `[batch, seqlen]`. Angles are taken in float64: in float32 an angle at
            position 2^20 is off by up to 0.06.

    Returns `[batch, heads, seqlen, 2 * head_dim]` in x's dtype. Every call computes its cosines and sines: one pair
    for each angle and position.

    Source: Qin et al., "Linearized Relative Positional Encoding" (arXiv 2307.09270); TransNormerLLM
    (arXiv 2307.14995) uses it in the first layer.

    Example:
        >>> import torch
        >>> from longctx.linear import LRPE
        >>> lrpe, (q, k) = LRPE(num_heads=2, head_dim=8), torch.randn(2, 1, 2, 1, 8)
        >>> at = lambda x, position: lrpe(x, torch.tensor([position]))
        >>> torch.allclose((at(q, 9) * at(k, 7)).sum(-1), (at(q, 2) * at(k, 0)).sum(-1), atol=1e-5)
        True
    """

    def __init__(self, num_heads: int, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim, dtype=wide))
        with torch.no_grad():
            self.theta.copy_(self.initial_theta())

    def initial_theta(self) -> Tensor:
        """Float64 `[num_heads, 1, head_dim]`."""
        exponent = torch.arange(self.theta.numel(), dtype=torch.float64, device=self.theta.device)
        return (self.base ** (-2.0 / self.theta.numel() * exponent)).view_as(self.theta)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        num_heads, _, head_dim = self.theta.shape
        if x.dim() != 4 or x.shape[3] != head_dim or x.shape[1] % num_heads:
            rule = f"have shape [batch, heads, seqlen, head_dim] = [*, a multiple of {num_heads}, *, {head_dim}]"
            raise ValueError(f"longctx::LRPE: `x` must {rule}; got {list(x.shape)}")
        legal = ((x.shape[2],), (x.shape[0], x.shape[2]))
        if tuple(positions.shape) not in legal or positions.is_floating_point():
            rule = f"be integers of shape [seqlen] or [batch, seqlen] = {list(legal[0])} or {list(legal[1])}"
            got = f"{positions.dtype} {list(positions.shape)}"
            raise ValueError(f"longctx::LRPE: `positions` must {rule}; got {got}")
        # [num_heads, seqlen, head_dim], behind batch if positions have it; then for all heads.
        angle = positions.double()[..., None, :, None] * self.theta.double()
        group_size = x.shape[1] // num_heads
        cos, sin = (wave.to(x.dtype).repeat_interleave(group_size, dim=-3) for wave in (angle.cos(), angle.sin()))
        return torch.cat([x * cos, x * sin], dim=-1)

    def _apply(self, fn: Any, recurse: bool = True) -> LRPE:
        theta = self.theta.data
        super()._apply(fn, recurse)
        if self.theta.dtype.itemsize < 4:
            self.theta.data = theta.to(self.theta.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"num_heads={self.theta.shape[0]}, head_dim={self.theta.shape[2]}"
