"""The registered mask function: which keys each query row sees, as at most two intervals instead of a matrix.

transformers describes a mask by a function of (query, key) indices. All the functions it builds itself (causal,
sliding window, chunks, packed documents) let a query see one interval around its own key, so its bounds are found by
bisection: `log2(kv_length)` evaluations a row, O(seqlen) memory. Padding then cuts the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

# Keys per row at which an unknown mask function is compared with the interval found for it.
NUM_PROBES = 8


def is_key_ranges(mask: object, seqlen_q: int) -> bool:
    """Whether `mask` came from `key_ranges_mask`; boolean and additive masks never have this dtype and shape."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.ndim == 4
        and mask.shape[1] <= 2
        and mask.shape[2:] == (seqlen_q, 2)
    )


def key_ranges_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """`key_ranges` int32 `[batch, R, q_length, 2]` in coordinates of the K/V that the cache returns.

    None means plain causal attention whose last key is the last query's. Otherwise `R` is 1, or 2 where padding splits
    a row. Of a causal mask, the last range of a row always ends behind the row's own key, also where it is empty
    because the row is padding: so the last row tells where K ends, although a static cache returns a longer buffer.

    Args:
        q_offset: position of the first query; a tensor with a static cache, and never read on the host.
        kv_offset: position of the first key of K/V (a sliding cache has dropped the earlier ones).
        attention_mask: bool `[batch, seen + q_length]`, False at padding.
        local_size: the size of a window or chunk that `mask_function` contains.
        allow_is_bidirectional_skip: given only when transformers builds a bidirectional mask.
        use_vmap: set when the caller added a mask function of its own.
    """
    if use_vmap:
        raise NotImplementedError(
            "longctx: custom mask functions (`or_mask_function`, `and_mask_function`) are not supported; use "
            "`attn_implementation='sdpa'` or 'flex_attention' for this model"
        )
    causal = allow_is_bidirectional_skip is None
    if causal and attention_mask is not None and isinstance(q_offset, int):
        # MiniMax's cache says that it is empty where its first layer is a linear one. The 2-D mask knows better.
        unseen = max(0, attention_mask.shape[-1] - kv_offset - kv_length)
        q_offset, kv_length = q_offset + unseen, kv_length + unseen
    if causal and isinstance(q_offset, int) and q_offset - kv_offset + q_length > kv_length:
        raise NotImplementedError(
            f"longctx: the cache returns {kv_length} keys from position {kv_offset}, fewer than the {q_length} queries "
            f"from position {q_offset} need; use `attn_implementation='sdpa'` with this cache"
        )
    ends_with_query = isinstance(q_offset, int) and q_offset - kv_offset + q_length == kv_length
    present = None if attention_mask is None else _present_keys(attention_mask, kv_length, kv_offset)
    if present is not None and ends_with_query and not torch.compiler.is_compiling() and bool(present.all()):
        present = None
    open_window = mask_function is causal_mask_function or (
        allow_is_causal_skip and local_size is not None and kv_offset == 0 and kv_length <= local_size
    )
    if causal and open_window and ends_with_query and present is None:
        return None

    rows = torch.arange(q_length, device=device)[None] + q_offset
    own = rows - kv_offset  # each query's own key, for a causal mask
    begin, end = _intervals(mask_function, batch_size, rows, own.clamp(0, kv_length - 1), kv_length, kv_offset, causal)
    if present is None:
        return torch.stack([begin, end], dim=-1)[:, None].int()
    if not causal:
        return torch.stack(_cut_bidirectional(begin, end, present), dim=-1)[:, None].int()
    before_gap, last = _cut_causal(begin, own.clamp(0, kv_length - 1), present)
    # While tracing the values are unknown, and both ranges are kept.
    if not torch.compiler.is_compiling() and bool((_run_starts(present).sum(1) <= 1).all()):
        return last[:, None].int()
    return torch.stack([before_gap, last], dim=1).int()


def _present_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The 2-D mask over the keys of K/V: bool [batch, kv_length]; keys it does not mention are absent."""
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _intervals(
    mask_function: Callable[..., Tensor],
    batch_size: int,
    rows: Tensor,
    own: Tensor,
    kv_length: int,
    kv_offset: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """First and one past the last key that `mask_function` shows each row: int64 [batch, q_length] each."""
    shape = (batch_size, rows.shape[1])
    own = own.expand(shape)
    if mask_function is bidirectional_mask_function:
        return torch.zeros_like(own), torch.full_like(own, kv_length)
    if mask_function is causal_mask_function:
        return torch.zeros_like(own), own + 1

    batch = torch.arange(batch_size, device=own.device)[:, None]
    head = torch.zeros_like(batch)

    def sees(key: Tensor) -> Tensor:
        return mask_function(batch, head, rows, key + kv_offset).expand(shape)

    begin = _bisect(sees, own, torch.zeros_like(own), kv_length)
    end = own + 1 if causal else _bisect(sees, own, torch.full_like(own, kv_length - 1), kv_length) + 1
    if rows.shape[1] > 1:
        ok = sees(own)
        if causal:
            ok = ok & ~(sees((own + 1).clamp(max=kv_length - 1)) & (own + 1 < kv_length))
        for probe in range(NUM_PROBES):
            key = (own * 7 + probe * kv_length // NUM_PROBES) % kv_length
            ok = ok & (sees(key) == ((key >= begin) & (key < end)))
        _require(
            ok.all(),
            "longctx: the mask shows a query a set of keys that is not one interval ending with itself, as image "
            "blocks with bidirectional attention do; use `attn_implementation='sdpa'` for this input",
        )
    return begin, end


def _bisect(sees: Callable[[Tensor], Tensor], seen: Tensor, limit: Tensor, kv_length: int) -> Tensor:
    """The key farthest from `seen` towards `limit` with every key between visible."""
    step = torch.sign(limit - seen)
    near, distance = torch.zeros_like(seen), (limit - seen).abs()
    for _ in range(kv_length.bit_length()):
        middle = (near + distance + 1) // 2
        visible = sees(seen + step * middle)
        near = torch.where(visible, middle, near)
        distance = torch.where(visible, distance, (middle - 1).clamp(min=0))
    return seen + step * near


def _cut_causal(begin: Tensor, own: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts intervals that end at `own` by padding, into the part before a gap and the part up to `own`.

    A padded row gets two empty ranges: it sees nothing, and the second still tells where its query stands.
    """
    own = own.expand_as(begin)
    key = torch.arange(present.shape[1], device=present.device).expand_as(present)
    starts = _run_starts(present)
    run_begin = torch.where(starts, key, 0).cummax(dim=1).values.gather(1, own)
    in_first_run = present & (starts.cumsum(1) == 1)
    first_begin = in_first_run.int().argmax(dim=1, keepdim=True)
    first_end = first_begin + in_first_run.sum(dim=1, keepdim=True)
    _require(
        (starts.sum(1) <= 2).all(),
        "longctx: `attention_mask` has more than one gap of padding inside a sequence; at most two runs of tokens a "
        "sequence are supported. Pad on one side, or use `attn_implementation='sdpa'`",
    )
    is_token = present.gather(1, own)
    before_gap = torch.maximum(begin, first_begin), torch.where(is_token, torch.minimum(first_end, run_begin), 0)
    last = torch.where(is_token, torch.maximum(begin, run_begin), own + 1), own + 1
    return torch.stack(before_gap, dim=-1), torch.stack(last, dim=-1)


def _cut_bidirectional(begin: Tensor, end: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts intervals to the tokens between left and right padding."""
    _require(
        (_run_starts(present).sum(1) <= 1).all(),
        "longctx: `attention_mask` of a bidirectional layer has padding between tokens; pad on one side, or use "
        "`attn_implementation='sdpa'`",
    )
    first = present.int().argmax(dim=1, keepdim=True)
    return torch.maximum(begin, first), torch.minimum(end, first + present.sum(dim=1, keepdim=True))


def _run_starts(present: Tensor) -> Tensor:
    """True at the first key of every run of tokens."""
    return present & ~torch.nn.functional.pad(present, (1, 0))[:, :-1]


def _require(condition: Tensor, message: str) -> None:
    """Raises unless `condition` holds; a compiled graph checks it when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise NotImplementedError(message)
