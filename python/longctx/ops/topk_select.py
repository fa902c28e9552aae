"""topk_select: scores -> the indices of the k best of each row, ascending."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.ops import _validate
from longctx.ops._call import call
from longctx.ops._register import register_op


def topk_select(
    scores: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    num_first: int = 0,
    num_last: int = 0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Picks the `k` best scores of each row and returns their indices in ascending order.

    The chosen set is the first `k` in the order (score descending, index ascending). `-0.0` equals `+0.0`, and NaN
    comes last, behind `-inf`: nothing is left out because of its value, so a row of at most `k` scores gives all its
    indices. Ties therefore have one answer, the same in every run and on every device.

    The first `num_first` and the last `num_last` indices of a row are always chosen. They take places among the `k`:
    the budget is the whole budget. `gather_attention` has the same two options for keys that come on top of a given
    set; a key that is in both counts once.

    Args:
        scores: `[..., n]` float32, bfloat16 or float16, of 1 to 9 dims; last dim contiguous, the others of any
            strides.
        k: number of indices in a row of the result, from 0 to `2**31 - 1`; may exceed `n`. Must leave room for
            the forced indices, `min(num_first + num_last, n)`.
        lengths: int32, the shape of `scores` without its last dim: scores at or beyond it do not exist. Clamped to
            `[0, n]`.
        num_first, num_last: numbers of forced indices at the start and at the end of each row.
        validate: also check that `lengths` lie in `[0, n]` (reads them).

    Returns:
        `indices` int32 `[..., k]`, ascending, -1 behind the last one, and `counts` int32 `[...]`, their number:
        `min(k, length)`.

    Raises:
        ValueError: an argument is wrong; the message names the op, argument, rule and what was given.

    Cost: no arithmetic. Most rows are read once, and `O(k)` scores a second time from cache; a row that is made to
    mislead the sample of it that sets the first bound is read twice. Scratch of about `16 k + 128 KiB` bytes per
    thread. Deterministic and independent of the number of threads. On CUDA a row of up to 64 KiB is read once, in one
    launch; longer ones three times in 16 bits and four times in float32, a launch each, whatever the scores.
    Gradients: the result is integer and has none.
    Source: Alabi et al., "Fast k-selection algorithms for graphics processing units" (2012), for the radix descent;
    selecting keys by score is common to Quest (arXiv 2406.10774) and the other top-k methods.

    Example:
        >>> import torch, longctx
        >>> scores = torch.tensor([[0.5, 2.0, -1.0, 2.0, 0.0]])
        >>> longctx.topk_select(scores, 3)
        (tensor([[0, 1, 3]], dtype=torch.int32), tensor([3], dtype=torch.int32))
        >>> longctx.topk_select(scores, 3, lengths=torch.tensor([2], dtype=torch.int32))
        (tensor([[ 0,  1, -1]], dtype=torch.int32), tensor([2], dtype=torch.int32))
        >>> longctx.topk_select(scores, 3, num_first=1, num_last=1)[0]
        tensor([[0, 1, 4]], dtype=torch.int32)
    """
    if validate:
        _validate.lengths("topk_select", "lengths", lengths, scores.shape[-1])
    result: tuple[Tensor, Tensor] = call(torch.ops.longctx.topk_select, scores, k, lengths, num_first, num_last)
    return result


def _fake(
    scores: Tensor, k: int, lengths: Tensor | None = None, num_first: int = 0, num_last: int = 0
) -> tuple[Tensor, Tensor]:
    rows = scores.shape[:-1]
    return scores.new_empty((*rows, k), dtype=torch.int32), scores.new_empty(rows, dtype=torch.int32)


register_op("topk_select", _fake)
