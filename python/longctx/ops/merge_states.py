"""merge_states: attention over disjoint key sets -> attention over their union."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops._call import call
from longctx.ops._register import register_op


def merge_states(out: Tensor, lse: Tensor, lse_override: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merges partial attention results of the same queries over disjoint sets of keys.

    `lse = log(sum_i exp(lse_i))` and `out = sum_i exp(lse_i - lse) * out_i`: exact, so attention may be
    split over key ranges, devices or branches and put together again.

    Args:
        out: `[num_states, batch, heads, seqlen, dim]`; float32, float64, bfloat16 or float16.
        lse: `[num_states, batch, heads, seqlen]`; natural-log sums of exponentials, float32 (float64
            for float64). A state with `lse = -inf` saw no key and contributes nothing.
        lse_override: like `lse`; used in its place where given, for methods that weigh states
            by something else than their own mass (grouped softmax).

    Returns:
        `(out [batch, heads, seqlen, dim], lse [batch, heads, seqlen])` in the dtypes of the inputs. Rows
        whose states all saw nothing give `out = 0`, `lse = -inf`.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names it.

    Cost: reads every state once; `2 * num_states * batch * heads * seqlen * dim` FLOPs, memory-bound.
    Deterministic. Gradients: none yet (raises NotImplementedError).
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).

    Example:
        >>> import torch, longctx
        >>> q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
        >>> halves = [longctx.attention(q, k[:, :, s], v[:, :, s], causal=False)
        ...           for s in (slice(0, 4), slice(4, 8))]
        >>> out, lse = longctx.merge_states(*(torch.stack(parts) for parts in zip(*halves)))
        >>> torch.allclose(out, longctx.attention(q, k, v, causal=False)[0], atol=1e-5)
        True
    """
    result: tuple[Tensor, Tensor] = call(torch.ops.longctx.merge_states, out, lse, lse_override)
    return result


def _fake(out: Tensor, lse: Tensor, lse_override: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])


register_op("merge_states", _fake)
