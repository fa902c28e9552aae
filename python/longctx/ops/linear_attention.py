"""linear_attention: attention without softmax, as a state that every token updates."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _linear_backward, _validate
from longctx.ops._call import call
from longctx.ops._linear import state_dtype
from longctx.ops._register import register_op


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool = True,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_segments: int = 0,
    reverse: bool = False,
    wide_out: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a scalar decay per head, or per head and token.

    `S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T` and `out_t = scale * q_t^T S_t`: token `t` itself has
    weight 1. With `normalize`, `z_t = exp(log_decay_t) * z_{t-1} + k_t` and
    `out_t = scale * q_t^T S_t / (q_t . z_t + eps)`. With `causal=False` every row sees every key, key `j`
    in row `i` with weight `exp(log_decay * |i - j|)` (positions count from 0 on both sides; the initial
    state stands before position 0). With `reverse` a causal sweep goes from the last token to the first:
    `S_t = R_{t+1} + k_t v_t^T`, `out_t = scale * q_t^T S_t` and `R_t = exp(log_decay_t) * S_t`, from
    `R_seqlen = initial_state` to the final state `R_0`.

    Args:
        q: `[batch, num_q_heads, seqlen_q, head_dim]`, float32, float64 (CPU), bfloat16 or float16. Any
            strides with a contiguous last dim. The same holds for k and v.
        k: `[batch, num_kv_heads, seqlen_k, head_dim]`; `num_q_heads % num_kv_heads == 0`, query head
            `h` reads kv head `h // (num_q_heads // num_kv_heads)`. `causal` needs `seqlen_k == seqlen_q`.
        v: `[batch, num_kv_heads, seqlen_k, head_dim_v]`.
        log_decay: float32 (or float64 beside float64) `[num_q_heads]` or `[batch, num_q_heads, seqlen]`,
            `<= 0` (larger values count as 0). `-inf` is memoryless; `None` is no decay.
        scale: factor on the output.
        causal: row `i` sees keys up to `i`.
        normalize: divide by the sum of weights.
        eps: added to that sum; not negative.
        initial_state: float32 (float64 for float64) `[num_seqs, num_q_heads, head_dim, head_dim_v]`, or
            `[.., head_dim_v + 1]` with `normalize`, whose last column is `z`; `None` is zero.
        cu_seqlens: int32 `[num_seqs + 1]`: sequences packed along the seqlen axis (`batch == 1`); empty
            sequences are legal.
        num_segments: sequences are cut into so many segments that run in parallel; on the CPU only where
            `causal`. 1 is one sweep; splitting a sequence on multiples of 64 tokens and passing the state
            on then gives the same bits as one call. 0 lets shape and thread or multiprocessor count choose,
            which agrees to rounding.
        reverse: causal only: row `i` sees keys from `i` on, with the weight that row `j` has for key `i`
            forwards: the direction of gradients. Chunks stay counted from the first token.
        wide_out: `out` is in the dtype of the states, not rounded to q's.
        validate: also check the values of log_decay and cu_seqlens (reads them).

    Returns:
        `out [batch, num_q_heads, seqlen_q, head_dim_v]` in q's dtype and in memory in q's order (heads or rows
        side by side), and the state after the last key (`reverse`: before the first), like `initial_state`:
        pass it on to continue, or to `linear_attention_decode`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: per token and head `64 * (head_dim + head_dim_v) + 4 * head_dim * head_dim_v` FLOPs; each input is
    read once, no state is kept per chunk. More than one segment adds the states of all but the last. All
    exponents are sums of log decays, so nothing overflows. Deterministic for a fixed thread count.
    Gradients: of q, k, v, log_decay and initial_state through both outputs: three more sweeps like this one.
    That of log_decay (0 where it is above 0 or `exp(log_decay)` is 0) adds two sweeps of states, which take the
    heads in up to eight slices: with that many at most `head_dim * head_dim_v * 4 / 64` bytes a token and head.
    Differentiable again, but for the gradient of log_decay.
    Source: Qin et al., "Lightning Attention-2" (arXiv 2401.04658); Katharopoulos et al., "Transformers are
    RNNs" (arXiv 2006.16236); a decay per token: Dao and Gu, "Mamba-2" (arXiv 2405.21060).

    Example:
        >>> import torch, longctx
        >>> q, k, v = (torch.randn(1, 4, 256, 32) for _ in range(3))
        >>> log_decay = -torch.tensor([0.5, 0.25, 0.1, 0.0])
        >>> out, state = longctx.linear_attention(q, k, v, log_decay)
        >>> first, state_64 = longctx.linear_attention(*(x[:, :, :64] for x in (q, k, v)), log_decay)
        >>> rest, _ = longctx.linear_attention(*(x[:, :, 64:] for x in (q, k, v)), log_decay, initial_state=state_64)
        >>> torch.allclose(torch.cat([first, rest], dim=2), out, atol=1e-4), state.shape
        (True, torch.Size([1, 4, 32, 32]))
    """
    if validate:
        _validate.decays("linear_attention", "log_decay", log_decay)
        _validate.offsets("linear_attention", "cu_seqlens", cu_seqlens, k.shape[2])
    result: tuple[Tensor, Tensor] = call(
        torch.ops.longctx.linear_attention,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        scale,
        causal,
        normalize,
        eps,
        num_segments,
        reverse,
        wide_out,
    )
    return result


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = True,
    normalize: bool = False,
    eps: float = 1e-6,
    num_segments: int = 0,
    reverse: bool = False,
    wide_out: bool = False,
) -> tuple[Tensor, Tensor]:
    num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (num_seqs, q.shape[1], q.shape[3], v.shape[3] + normalize)
    wide = state_dtype(q.dtype)
    batch, num_heads, seqlen, head_dim_v = *q.shape[:3], v.shape[3]
    dtype = wide if wide_out else q.dtype
    if num_heads == 1 or q.stride(1) >= q.stride(2):
        out = q.new_empty((batch, num_heads, seqlen, head_dim_v), dtype=dtype)
    else:
        out = q.new_empty((batch, seqlen, num_heads, head_dim_v), dtype=dtype).transpose(1, 2)
    return out, q.new_empty(state, dtype=wide)


register_op("linear_attention", _fake, gradient=_linear_backward)
