"""The gradient of linear_attention: sweeps of the op itself, with q, k, v and dout in other places.

Row `i` reads `S_i dout_i` for dq; key `j` reads `dS_j v_j` for dk and `dS_j^T k_j` for dv, where `dS` is the state of
`q_i dout_i^T` in the other direction. `initial_state` stands where the first sweep starts, the gradient of the final
state where the other two do, and what they end with is the gradient of `initial_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.ops._call import call
from longctx.ops._linear_decay_gradient import decay_gradient, inner_products

MAX_SLICES = 8  # of heads, one after the other: bounds the float32 rows and the states behind a decay's gradient


class Needs(NamedTuple):
    """Which gradients are wanted. torch leaves out trailing arguments that have their default."""

    q: bool = False
    k: bool = False
    v: bool = False
    log_decay: bool = False
    initial_state: bool = False


class Gradients(NamedTuple):
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    log_decay: Tensor | None = None
    initial_state: Tensor | None = None

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Gradients:
        named = zip(self._fields, self, strict=True)
        return Gradients(*[None if x is None else function(name, x) for name, x in named])

    def plus(self, other: Gradients) -> Gradients:
        pairs = zip(self, other, strict=True)
        return Gradients(*[a if b is None else b if a is None else a + b for a, b in pairs])


@dataclass(frozen=True)
class Sweep:
    """linear_attention with the arguments that all calls for one gradient share."""

    log_decay: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    causal: bool
    num_segments: int

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, reverse: bool = False, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = call(torch.ops.longctx.linear_attention,
            q, k, v, self.log_decay, state, self.cu_seqlens, self.scale, self.causal, False, 0.0, self.num_segments,
            reverse, wide,
        )  # fmt: skip
        return result

    def of_heads(self, heads: slice) -> Sweep:
        if self.log_decay is None:
            return self
        return replace(self, log_decay=self.log_decay[:, heads] if self.log_decay.dim() == 3 else self.log_decay[heads])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    scale, causal, normalize, eps, num_segments, reverse, _ = ctx.options
    needs = Needs(*ctx.needs_input_grad[:5])
    dtype, head_dim_v = q.dtype, v.shape[3]
    if scale == 0.0 or dout is None:  # the final state alone tells of the inputs
        dout, scale = zeros_like_rows(q, head_dim_v), 1.0
    if dtype.itemsize == 2 and (normalize or (dtype == torch.float16 and dout.dtype != dtype)):
        # Through a quotient dq is a small difference (bfloat16 was measured 1.6e-2 off), and the gradient over a sum of
        # weights, or of a row that was not rounded, may leave the range of float16.
        q, k, v = q.float(), k.float(), v.float()
    sweep = Sweep(log_decay, cu_seqlens, scale, causal, num_segments)
    if normalize:
        v = torch.cat([v, v.new_ones(()).expand(*v.shape[:3], 1)], dim=3)
        sweep = replace(sweep, scale=1.0)
        rows, _ = sweep(q, k, v, initial_state, reverse=reverse, wide=True)
        dout = _through_quotient(rows, dout, scale, eps)
    dout = dout.to(q.dtype)
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    if dfinal is not None:
        dfinal = dfinal / sweep.scale  # sweeps scale what they read of it
    gradients = _all_heads(sweep, q, k, v, dout, initial_state, dfinal, reverse, needs)

    def finish(name: str, gradient: Tensor) -> Tensor:
        if name == "initial_state":
            return gradient
        if name == "log_decay":
            # Above 0 a decay counts as 0; where nothing is left of a weight, nothing of its gradient is.
            return gradient.masked_fill((log_decay > 0) | (log_decay.exp() == 0), 0.0).to(log_decay.dtype)
        return (gradient[..., :head_dim_v] if name == "v" else gradient).to(dtype)

    no_gradients = [None] * (1 + len(ctx.options))
    return (*gradients.map(finish), *no_gradients)


def zeros_like_rows(rows: Tensor, columns: int) -> Tensor:
    """Zeros for every row, in the memory of one."""
    return rows.new_zeros(columns).expand(*rows.shape[:3], columns)


def _through_quotient(rows: Tensor, dout: Tensor, scale: float, eps: float) -> Tensor:
    """The gradient of `rows`, whose last column plus eps divided the others, times `scale`."""
    inverse = 1.0 / (rows[..., -1:] + eps)
    dvalues = scale * inverse * dout
    dsum = -inverse * (dvalues * rows[..., :-1]).sum(3, keepdim=True)
    return torch.cat([dvalues, dsum], dim=3)


def _all_heads(
    sweep: Sweep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    initial_state: Tensor | None,
    dfinal: Tensor | None,
    reverse: bool,
    needs: Needs,
) -> Gradients:
    """The gradients of grouped heads: those of every query head, summed over its group."""
    num_kv_heads, group_size = k.shape[1], q.shape[1] // k.shape[1]
    size = -(-num_kv_heads // MAX_SLICES) if needs.log_decay else num_kv_heads
    parts = []
    for first in range(0, num_kv_heads, size):
        last = min(first + size, num_kv_heads)
        heads = slice(first * group_size, last * group_size)
        keys, values = k[:, first:last], v[:, first:last]
        if group_size > 1:
            keys, values = keys.repeat_interleave(group_size, dim=1), values.repeat_interleave(group_size, dim=1)
        before, after = (None if state is None else state[:, heads] for state in (initial_state, dfinal))
        rows = (q[:, heads], keys, values, dout[:, heads])
        if needs.log_decay and q.dtype.itemsize == 2:
            # A decay's gradient is a small difference, of which rounded states and weights leave too little.
            rows = (rows[0].float(), keys.float(), values.float(), rows[3].float())
        if sweep.causal:
            part = _causal(sweep.of_heads(heads), *rows, before, after, reverse, needs, wide=group_size > 1)
        else:
            part = _noncausal(sweep.of_heads(heads), *rows, before, after, needs, wide=group_size > 1)

        def finish(name: str, gradient: Tensor, num_groups: int = last - first) -> Tensor:
            if name in ("k", "v") and group_size > 1:
                gradient = gradient.unflatten(1, (num_groups, group_size)).sum(2)
            return gradient.to(q.dtype) if name in ("q", "k", "v") else gradient

        parts.append(part.map(finish))
    if len(parts) == 1:
        return parts[0]
    per_head = sweep.log_decay is not None and sweep.log_decay.dim() == 1

    def join(name: str, gradient: Tensor) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=0 if name == "log_decay" and per_head else 1)

    return parts[0].map(join)


def _transposed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(2, 3)


def _causal(
    sweep: Sweep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    initial_state: Tensor | None,
    dfinal: Tensor | None,
    reverse: bool,
    needs: Needs,
    *,
    wide: bool = False,
) -> Gradients:
    """`dfinal` is the gradient of the final state over `sweep.scale`; `wide`: dk and dv are not rounded."""
    dq = dk = dv = ddecay = dinitial = None
    if needs.q or needs.log_decay:
        dq, _ = sweep(dout, v, k, _transposed(initial_state), reverse=reverse, wide=needs.log_decay)
    if needs.k or needs.log_decay:
        dk, _ = sweep(v, dout, q, _transposed(dfinal), reverse=not reverse, wide=wide or needs.log_decay)
    if needs.v or needs.initial_state:
        dv, dinitial = sweep(k, q, dout, dfinal, reverse=not reverse, wide=wide)
        dinitial = dinitial * sweep.scale
    if needs.log_decay:
        assert dq is not None
        assert dk is not None
        assert sweep.log_decay is not None
        crossing = inner_products(q, dq) - inner_products(k, dk)
        ends = ((k, v, initial_state), (q, dout, dfinal))
        if reverse:
            crossing, ends = -crossing, ends[::-1]
        ddecay = decay_gradient(sweep.log_decay, sweep.cu_seqlens, sweep.scale, *ends, crossing)
    return Gradients(
        dq if needs.q else None,
        dk if needs.k else None,
        dv if needs.v else None,
        ddecay,
        dinitial if needs.initial_state else None,
    )


def _noncausal(
    sweep: Sweep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    initial_state: Tensor | None,
    dfinal: Tensor | None,
    needs: Needs,
    *,
    wide: bool,
) -> Gradients:
    """Weights are symmetric, so that the adjoint has the same; only states have a direction."""
    causal = replace(sweep, causal=True)
    dq = dk = dv = dinitial = None
    if needs.q:
        dq, _ = sweep(dout, v, k, _transposed(initial_state))
    if needs.k:
        dk, _ = sweep(v, dout, q, wide=wide or dfinal is not None)
    if needs.v:
        dv, _ = sweep(k, q, dout, wide=wide or dfinal is not None)
    if needs.initial_state:
        # Rows read the initial state with the weights of the causal sweep.
        _, dinitial = causal(zeros_like_rows(q, q.shape[3]), q, dout, reverse=True)
        dinitial = dinitial * sweep.scale
    result = Gradients(dq, dk, dv, None, dinitial)
    if dfinal is not None:
        no_rows = zeros_like_rows(k, k.shape[3]), k, v, zeros_like_rows(v, v.shape[3])
        result = result.plus(
            _causal(causal, *no_rows, initial_state, dfinal, False, needs._replace(q=False), wide=True)
        )
    if needs.log_decay:
        # Keys before a row, and keys behind it: the same with rows and keys in each other's place.
        length = max(q.shape[2], k.shape[2])
        q, k, v, dout = (F.pad(x, (0, 0, 0, length - x.shape[2])) for x in (q, k, v, dout))
        decay_alone = Needs(log_decay=True)
        result = result.plus(_causal(causal, q, k, v, dout, initial_state, None, False, decay_alone))
        result = result.plus(_causal(causal, k, q, dout, v, None, None, False, decay_alone))
    return result
