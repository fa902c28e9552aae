"""linear_attention_decode: a few tokens of linear_attention on a pool of states, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._register import register_op


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    state_indices: Tensor | None = None,
    commit: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """One or a few tokens per batch entry: reads and writes the state once a token, in place.

    `S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T`, `out_t = scale * q_t^T S_t`, and `normalize` as in
    `longctx.linear_attention`, with `state` as the state before the first token.

    Args:
        q: `[batch, num_q_heads, num_tokens, head_dim]`, float32, float64 (CPU), bfloat16 or float16; any
            strides with a contiguous last dim.
        k: `[batch, num_kv_heads, num_tokens, head_dim]`; `num_q_heads % num_kv_heads == 0`.
        v: `[batch, num_kv_heads, num_tokens, head_dim_v]`.
        log_decay: float32 (or float64 beside float64) `[num_q_heads]` or `[batch, num_q_heads,
            num_tokens]`, `<= 0`, or `None`.
        state: float32 (float64 for float64) `[num_slots, num_q_heads, head_dim, head_dim_v]`, or `[..,
            head_dim_v + 1]` with `normalize`; any strides with a contiguous last dim. **Changed in place.**
        scale, normalize, eps: as in `longctx.linear_attention`.
        state_indices: int32 `[batch]`: the slot of each batch entry, no two the same; -1 is padding: its
            rows are 0 and no state changes. `None` is slot `b` for entry `b`, with `num_slots == batch`.
        commit: int32 `[batch]`, each in `[0, num_tokens]`: the state keeps only so many first tokens of a
            draft, while `out` is that of all tokens. `None` keeps all.
        validate: also check the values of log_decay, state_indices and commit (reads them). Without it,
            slots out of range are skipped.

    Returns:
        `out [batch, num_q_heads, num_tokens, head_dim_v]` in q's dtype.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given, and
            the state is untouched.
        NotImplementedError: an input requires a gradient.

    Cost: `5 * head_dim * head_dim_v` FLOPs and `8 * head_dim * head_dim_v` bytes a token and head: bound by
    memory. Deterministic. Gradients: none (raises NotImplementedError).
    Source: Qin et al., "TransNormerLLM" (arXiv 2307.14995), robust inference.

    Example:
        >>> import torch, longctx
        >>> q, k, v = (torch.randn(2, 4, 70, 16) for _ in range(3))
        >>> log_decay = -torch.tensor([0.5, 0.25, 0.1, 0.0])
        >>> out, _ = longctx.linear_attention(q, k, v, log_decay)
        >>> prompt = (x[:, :, :69] for x in (q, k, v))
        >>> _, state = longctx.linear_attention(*prompt, log_decay)
        >>> last = longctx.linear_attention_decode(*(x[:, :, 69:] for x in (q, k, v)), log_decay, state)
        >>> torch.allclose(last, out[:, :, 69:], atol=1e-4)
        True
    """
    if validate:
        _validate.decays("linear_attention_decode", "log_decay", log_decay)
        _validate.slots("linear_attention_decode", "state_indices", state_indices, state.shape[0])
        _validate.counts("linear_attention_decode", "commit", commit, q.shape[2])
    floats = (q, k, v, state) if log_decay is None else (q, k, v, log_decay, state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in floats):
        raise NotImplementedError(
            "longctx::linear_attention_decode has no backward: it changes `state` in place; "
            "call it under torch.no_grad(), or linear_attention"
        )
    result: Tensor = torch.ops.longctx.linear_attention_decode(
        q,
        k,
        v,
        log_decay,
        state,
        state_indices,
        commit,
        scale,
        normalize,
        eps,
    )
    return result


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


register_op("linear_attention_decode", _fake, differentiable=False)
