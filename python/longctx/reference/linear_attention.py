"""Naive twins of `longctx.linear_attention`, `linear_attention_states` and `linear_attention_decode`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longctx.reference._mask import Sequence, sequences


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
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; see `longctx.linear_attention`."""
    batch, num_heads, seqlen_q, head_dim = q.shape
    keys, values, decay = _per_head(k, v, log_decay, num_heads, normalize)
    state_dim = values.shape[3]
    rows = q.double().new_zeros(batch, num_heads, seqlen_q, state_dim)
    ends: list[Tensor] = []
    for s, seq in enumerate(sequences(batch, seqlen_q, k.shape[2], cu_seqlens, cu_seqlens)):
        length = seq.q_end - seq.q_begin
        q_rows = q[seq.batch, :, seq.q_begin : seq.q_end].double()
        state = _state_before(initial_state, s, keys, values)
        if reverse:
            after, decayed = _reversed_states(keys, values, decay, seq, state)
            steps = [state, *decayed[::-1]]
        else:
            steps = list(_states(keys, values, decay, seq, state))
            if causal:
                after = steps[1:]
            elif log_decay is None:
                after = [steps[-1]] * length
            else:
                after = _both_sides(steps, keys, values, decay, seq, length, log_decay)
        ends.append(steps[-1])
        for i, state in enumerate(after):
            rows[seq.batch, :, seq.q_begin + i] = torch.einsum("hd,hde->he", q_rows[:, i], state)
    final = torch.stack(ends) if ends else rows.new_zeros(0, num_heads, head_dim, state_dim)
    out = _outputs(rows, v, scale, normalize, eps)
    return _narrow(out, q.dtype) if wide_out else out.to(q.dtype), _narrow(final, q.dtype)


def linear_attention_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """The state after every 64th and the last token, or before every 64th; see `longctx.linear_attention_states`."""
    batch, num_heads, seqlen, head_dim = k.shape
    if log_decay is not None:
        num_heads = log_decay.shape[-2 if log_decay.dim() == 3 else -1]
    elif initial_state is not None:
        num_heads = initial_state.shape[1]
    keys, values, decay = _per_head(k, v, log_decay, num_heads, normalize)
    num_chunks = -(-seqlen // 64) + (0 if cu_seqlens is None else len(cu_seqlens) - 1)
    states = keys.new_zeros(batch, num_heads, num_chunks, head_dim, values.shape[3])
    row = 0  # packed sequences own consecutive chunks
    for s, seq in enumerate(sequences(batch, seqlen, seqlen, cu_seqlens, cu_seqlens)):
        row = 0 if cu_seqlens is None else row
        length = seq.k_end - seq.k_begin
        start = _state_before(initial_state, s, keys, values)
        if reverse:
            _, decayed = _reversed_states(keys, values, decay, seq, start)
            wanted = decayed[::64]
        else:
            after = list(_states(keys, values, decay, seq, start))[1:]
            wanted = [state for t, state in enumerate(after, 1) if t % 64 == 0 or t == length]
        for state in wanted:
            states[seq.batch, :, row] = state
            row += 1
    return _narrow(states, k.dtype)


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
) -> Tensor:
    """The recurrence from the states of `state`, which is changed; see `longctx.linear_attention_decode`."""
    batch, num_heads, num_tokens, _ = q.shape
    keys, values, decay = _per_head(k, v, log_decay, num_heads, normalize)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b in range(batch):
        slot = b if state_indices is None else int(state_indices[b])
        if not 0 <= slot < len(state):
            continue
        kept = num_tokens if commit is None else min(max(int(commit[b]), 0), num_tokens)
        whole = Sequence(b, 0, num_tokens, 0, num_tokens)
        steps = list(_states(keys, values, decay, whole, state[slot].double()))
        rows = q.double().new_zeros(num_heads, num_tokens, values.shape[3])
        for t in range(num_tokens):
            rows[:, t] = torch.einsum("hd,hde->he", q[b, :, t].double(), steps[t + 1])
        out[b] = _outputs(rows, v, scale, normalize, eps).to(q.dtype)
        state[slot] = steps[kept].to(state.dtype)
    return out


def _per_head(
    k: Tensor, v: Tensor, log_decay: Tensor | None, num_heads: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v (with a column of ones) and exp(log_decay) [batch, num_heads, seqlen] in float64, one per query head."""
    group_size = num_heads // k.shape[1]
    keys, values = k.double(), v.double()
    if normalize:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=3)
    shape = (k.shape[0], num_heads, k.shape[2])
    if log_decay is None:
        decay = keys.new_ones(shape)
    else:
        decay = log_decay.double().exp()
        decay = decay if decay.dim() == 3 else decay[None, :, None].expand(shape)
    return keys.repeat_interleave(group_size, dim=1), values.repeat_interleave(group_size, dim=1), decay


def _state_before(initial_state: Tensor | None, s: int, keys: Tensor, values: Tensor) -> Tensor:
    if initial_state is not None:
        return initial_state[s].double()
    return keys.new_zeros(keys.shape[1], keys.shape[3], values.shape[3])


def _states(keys: Tensor, values: Tensor, decay: Tensor, seq: Sequence, state: Tensor) -> Iterator[Tensor]:
    """The state before the first token of `seq` and after each."""
    yield state
    for t in range(seq.k_begin, seq.k_end):
        step = keys[seq.batch, :, t, :, None] * values[seq.batch, :, t, None, :]
        state = decay[seq.batch, :, t, None, None] * state + step
        yield state


def _reversed_states(
    keys: Tensor, values: Tensor, decay: Tensor, seq: Sequence, state: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every token of `seq`, where `state` stands behind the last: the state with it, and then decayed by it."""
    with_token, decayed = [], []
    for t in reversed(range(seq.k_begin, seq.k_end)):
        step = keys[seq.batch, :, t, :, None] * values[seq.batch, :, t, None, :]
        with_token.append(state + step)
        state = decay[seq.batch, :, t, None, None] * with_token[-1]
        decayed.append(state)
    return with_token[::-1], decayed[::-1]


def _both_sides(
    steps: list[Tensor], keys: Tensor, values: Tensor, decay: Tensor, seq: Sequence, length: int, log_decay: Tensor
) -> list[Tensor]:
    """What row i reads without a mask: the state after token i, and later keys with the decay up to them."""
    num_keys = seq.k_end - seq.k_begin
    later = torch.zeros_like(steps[0])  # sum over j > i of exp(log_decay * (j - i)) k_j v_j^T
    result = []
    for i in reversed(range(max(length, num_keys))):
        if i < num_keys:
            earlier = steps[i + 1]
        else:
            # Rows behind the last key exist only under a constant decay, which goes on.
            earlier = torch.exp(log_decay.double() * (i + 1 - num_keys))[:, None, None] * steps[-1]
        if i < length:
            result.append(earlier + later)
        if i < num_keys:
            t = seq.k_begin + i
            step = keys[seq.batch, :, t, :, None] * values[seq.batch, :, t, None, :]
            later = decay[seq.batch, :, t, None, None] * (later + step)
    return result[::-1]


def _outputs(rows: Tensor, v: Tensor, scale: float, normalize: bool, eps: float) -> Tensor:
    if not normalize:
        return scale * rows
    return scale * rows[..., : v.shape[3]] / (rows[..., v.shape[3] :] + eps)


def _narrow(state: Tensor, dtype: torch.dtype) -> Tensor:
    return state if dtype == torch.float64 else state.float()
