"""threshold_select: scores -> the indices of those that matter, as many as each row needs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op


def threshold_select(
    scores: Tensor,
    *,
    value: float,
    method: Literal["threshold", "cumulative"] = "threshold",
    max_k: int,
    lengths: Tensor | None = None,
    num_first: int = 0,
    num_last: int = 0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Picks the scores of each row that pass a rule, at most `max_k`, and returns their indices in ascending order.

    - `threshold`: those with `score >= value`.
    - `cumulative`: the scores are logits, and the fewest of them are chosen that hold the share `value` of the row's
      softmax: the shortest prefix of the order of `topk_select` (score descending, index ascending) whose mass, forced
      indices included, reaches `value` times the mass of the row. The crossing index is kept.

    If more than `max_k` pass, the first of them in that order stay. NaN never passes, and of `-inf` only
    `value = -inf` is passed. The first `num_first` and the last `num_last` indices are chosen in any case, and take
    places among the `max_k`.

    The mass of a score is an integer, so that sums are exact and every device cuts at the same index. With
    `t = (highest - score) * 1.44269504` in float32, each operation rounded, and `q = floor(t * 2**24)`, it is
    `floor(p * 2**(shift - 30) / 2**(q >> 24))`, where `p` is `2**30 * 2**-(q % 2**24 / 2**24)` by the integer
    polynomial of `include/longctx/logit_mass.h`; from `t = 42` on it is 0. That is `exp(score - highest) * 2**shift`
    to a relative 2e-7 and the rounding of `t`. `shift` is 40, and `61 - bit_length(length)` for rows of `2**21` scores
    and more. Beside `+inf`, only `+inf` has mass. The share to reach is `ceil(value * mass)` in float64, with `value`
    rounded to float32 and clamped to `[0, 1]`.

    Args:
        scores: `[..., n]` float32, bfloat16 or float16, of 1 to 9 dims; last dim contiguous, the others of any
            strides.
        value: the threshold, or the share. Rounded to float32.
        method: see above.
        max_k: number of indices in a row of the result, from 0 to `2**31 - 1`. Must leave room for the forced
            indices, `min(num_first + num_last, n)`.
        lengths: int32, the shape of `scores` without its last dim: scores at or beyond it do not exist. Clamped to
            `[0, n]`.
        num_first, num_last: numbers of forced indices at the start and at the end of each row.
        validate: also check that `lengths` lie in `[0, n]` (reads them).

    Returns:
        `indices` int32 `[..., max_k]`, ascending, -1 behind the last one, and `counts` int32 `[...]`, their number.
        The sizes follow from shapes and `max_k` alone, so nothing is read back.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: `threshold` reads most rows once, as `topk_select`; `cumulative` once more, with about 25 integer operations a
    score. Deterministic, and independent of the number of threads. On CUDA as `topk_select`, for `cumulative` with one
    launch more for rows beyond 64 KiB.
    Gradients: the result is integer and has none.
    Source: the global threshold of Squeezed Attention (arXiv 2411.09688) and the top-p budgets of Twilight
    (arXiv 2502.02770).

    Example:
        >>> import torch, longctx
        >>> logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, 1.0]])
        >>> longctx.threshold_select(logits, value=1.0, max_k=4)
        (tensor([[ 1,  3,  4, -1]], dtype=torch.int32), tensor([3], dtype=torch.int32))
        >>> longctx.threshold_select(logits, value=0.8, method="cumulative", max_k=4)
        (tensor([[ 1,  3, -1, -1]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    if validate:
        _validate.lengths("threshold_select", "lengths", lengths, scores.shape[-1])
    result: tuple[Tensor, Tensor] = call(
        torch.ops.longctx.threshold_select, scores, float(value), max_k, method, lengths, num_first, num_last
    )
    return result


def _fake(scores: Tensor, value: float, max_k: int, *options: object) -> tuple[Tensor, Tensor]:
    rows = scores.shape[:-1]
    return scores.new_empty((*rows, max_k), dtype=torch.int32), scores.new_empty(rows, dtype=torch.int32)


register_op("threshold_select", _fake)
