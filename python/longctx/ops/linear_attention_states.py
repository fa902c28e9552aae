"""linear_attention_states: the states of linear_attention between its chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._linear import CHUNK_SIZE, state_dtype
from longctx.ops._register import register_op


def linear_attention_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    validate: bool = False,
) -> Tensor:
    """The state after every chunk of 64 tokens: points from which a prefix can be continued.

    `S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T`, as in `longctx.linear_attention`, at the last token of
    every chunk. The bits are those of the sweep with `num_segments=1`. With `reverse`, the state `R_t` that
    stands before the first token of every chunk in the reversed sweep.

    Args:
        k: `[batch, num_kv_heads, seqlen, head_dim]`, float32, float64 (CPU), bfloat16 or float16; any
            strides with a contiguous last dim.
        v: `[batch, num_kv_heads, seqlen, head_dim_v]`.
        log_decay: float32 (or float64 beside float64) `[num_q_heads]` or `[batch, num_q_heads, seqlen]`,
            `<= 0`, or `None`. Its heads (else those of initial_state, else those of k) are the heads of
            the states; they are a multiple of num_kv_heads.
        normalize: the states have a last column `z_t = exp(log_decay_t) * z_{t-1} + k_t`.
        initial_state: float32 (float64 for float64) `[num_seqs, num_q_heads, head_dim, head_dim_v]`, or
            `[.., head_dim_v + 1]` with `normalize`; `None` is zero.
        cu_seqlens: int32 `[num_seqs + 1]`: sequences packed along the seqlen axis (`batch == 1`).
        reverse: the sweep from the last token to the first, as in `longctx.linear_attention`.
        validate: also check the values of log_decay and cu_seqlens (reads them).

    Returns:
        `[batch, num_q_heads, num_chunks, head_dim, head_dim_v]` (`+ 1` with `normalize`), float32 (float64
        for float64); entry `c` is the state after `min(64 * (c + 1), seqlen)` tokens; with `reverse`, the
        state before token `64 * c`. Packed, sequence `s` owns the next `ceil(len_s / 64)` chunks of
        `ceil(seqlen / 64) + num_seqs`; the rest is zero.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: per token and head `2 * head_dim * head_dim_v` FLOPs; writes `head_dim * head_dim_v * 4 / 64` bytes.
    Deterministic. Gradients: none (raises NotImplementedError).
    Source: Qin et al., "Lightning Attention-2" (arXiv 2401.04658).

    Example:
        >>> import torch, longctx
        >>> q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
        >>> states = longctx.linear_attention_states(k, v)
        >>> states.shape
        torch.Size([1, 2, 4, 16, 16])
        >>> out, final_state = longctx.linear_attention(q, k, v, num_segments=1)
        >>> rest, _ = longctx.linear_attention(
        ...     *(x[:, :, 128:] for x in (q, k, v)), initial_state=states[:, :, 1], num_segments=1)
        >>> torch.equal(rest, out[:, :, 128:]), torch.equal(states[:, :, -1], final_state)
        (True, True)
    """
    if validate:
        _validate.decays("linear_attention_states", "log_decay", log_decay)
        _validate.offsets("linear_attention_states", "cu_seqlens", cu_seqlens, k.shape[2])
    result: Tensor = call(
        torch.ops.longctx.linear_attention_states, k, v, log_decay, initial_state, cu_seqlens, normalize, reverse
    )
    return result


def _fake(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: bool = False,
    reverse: bool = False,
) -> Tensor:
    num_heads = k.shape[1]
    if log_decay is not None:
        num_heads = log_decay.shape[1 if log_decay.dim() == 3 else 0]
    elif initial_state is not None:
        num_heads = initial_state.shape[1]
    num_chunks = (k.shape[2] + CHUNK_SIZE - 1) // CHUNK_SIZE
    num_chunks += 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (k.shape[0], num_heads, num_chunks, k.shape[3], v.shape[3] + normalize)
    return k.new_empty(shape, dtype=state_dtype(k.dtype))


register_op("linear_attention_states", _fake)
