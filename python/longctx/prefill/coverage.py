"""How much of dense attention a sparse method keeps, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.ops import attention
from longctx.prefill.policy import AttentionContext, Policy, get_policy


def coverage(q: Tensor, k: Tensor, policy: str | Policy, **context: Any) -> Tensor:
    """The share of softmax mass that each query row keeps under `policy`: `exp(lse_sparse - lse_dense)`.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`.
        policy: a policy, or its name and options.
        context: fields of `AttentionContext`, as in the call whose quality is asked for.

    Returns:
        float32 (float64 for float64) `[batch, num_q_heads, seqlen_q]` in [0, 1] up to rounding; 1 where a row sees no
        key at all.

    Raises:
        ValueError: the policy changes logits (`LMInfinite`), so that there is no common softmax.

    Cost: one dense and one sparse attention with values of one channel.

    Example:
        >>> import torch, longctx
        >>> q, k = torch.randn(1, 8, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> longctx.coverage(q, k, "dense").min().item()
        1.0
    """
    policy = get_policy(policy)
    call = AttentionContext(**context)
    if policy.changes_logits:
        raise ValueError(f"longctx::coverage: `policy` must keep the logits of dense attention; got {policy.name}")
    values = k[..., :1]
    _, lse_dense = attention(q, k, values, **call.options())
    _, lse_sparse = policy.attend(q, k, values, call)
    return torch.where(lse_dense == -torch.inf, 1.0, torch.exp(lse_sparse - lse_dense))
