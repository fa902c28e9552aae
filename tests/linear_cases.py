"""Valid calls of the linear attention family, and what is illegal about their arguments."""

from __future__ import annotations

from typing import Any

import torch

from op_case import (
    INT32_MAX,
    INT64_MAX,
    Call,
    Invalid,
    OpCase,
    int32,
    qkv,
    randn,
    without,
)


def linear(
    dtype: torch.dtype,
    *,
    decay: tuple[int, ...],
    normalize: bool = False,
    num_states: int = 0,
    seed: int = 0,
    **sizes: Any,
) -> Call:
    """q, k, v with log decays of shape `decay`, among them 0 and -inf, and a state for each of `num_states`."""
    call = qkv(dtype, seed=seed, **sizes)
    if normalize:  # a sum of weights far from 0
        call |= {"q": call["q"].abs(), "k": call["k"].abs()}
    log_decay = -randn(*decay, seed=seed + 3).abs()
    log_decay.flatten()[::5] = 0.0
    log_decay.flatten()[3::7] = -torch.inf
    call |= {"log_decay": log_decay}
    if num_states:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (num_states, call["q"].shape[1], call["q"].shape[3], call["v"].shape[3] + normalize)
        call |= {"initial_state": randn(*shape, dtype=wide, seed=seed + 4).abs()}
    return call


def linear_plain(dtype: torch.dtype) -> Call:
    return linear(dtype, decay=(4,), seqlen_q=75, seqlen_k=75, head_dim_v=24)


def linear_all_options(dtype: torch.dtype) -> Call:
    sizes = {"num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 150, "seqlen_k": 150, "head_dim_v": 24}
    call = linear(dtype, decay=(2, 6, 150), normalize=True, num_states=2, seed=20, **sizes)
    return call | {"normalize": True, "scale": 0.3, "eps": 0.5, "num_segments": 2}


def linear_packed(dtype: torch.dtype) -> Call:
    """Packed sequences, some of them empty."""
    call = linear(dtype, decay=(1, 4, 150), batch=1, seqlen_q=150, seqlen_k=150, head_dim_v=24, seed=30)
    return call | {"cu_seqlens": int32(0, 0, 17, 22, 22, 145, 150)}


def linear_cross(dtype: torch.dtype) -> Call:
    return linear(dtype, decay=(4,), num_states=2, seqlen_q=101, seqlen_k=75, head_dim_v=24, seed=40) | {
        "causal": False
    }


def linear_reversed(dtype: torch.dtype) -> Call:
    sizes = {"num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 150, "seqlen_k": 150, "head_dim_v": 24}
    call = linear(dtype, decay=(2, 6, 150), num_states=2, seed=70, **sizes)
    rows_first = {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    return call | rows_first | {"scale": 0.3, "num_segments": 2, "reverse": True, "wide_out": True}


def decode_plain(dtype: torch.dtype) -> Call:
    call = linear(dtype, decay=(4,), num_states=2, seqlen_q=3, seqlen_k=3, head_dim_v=24, seed=50)
    return call | {"state": call.pop("initial_state")}


def decode_all_options(dtype: torch.dtype) -> Call:
    sizes = {"batch": 3, "num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 4, "seqlen_k": 4, "head_dim_v": 24}
    call = linear(dtype, decay=(3, 6, 4), normalize=True, num_states=5, seed=60, **sizes)
    options = {"normalize": True, "scale": 0.3, "eps": 0.5}
    slots = {"state_indices": int32(4, -1, 1), "commit": int32(1, 2, 0)}
    return call | {"state": call.pop("initial_state")} | options | slots


LINEAR_OPTIONS = {"scale": (float("nan"), float("inf")), "eps": (float("nan"), float("inf"), -1.0)}

INVALID_DECAYS = {
    "log_decay positive": Invalid("plain", "log_decay", torch.tensor([0.0, -1.0, 1e-6, -1.0])),
    "log_decay NaN": Invalid("plain", "log_decay", torch.tensor([0.0, -1.0, float("nan"), -1.0])),
}

INVALID_LINEAR_SEQUENCES = {
    "cu_seqlens falls": Invalid("packed", "cu_seqlens", int32(0, 17, 0, 22, 22, 145, 150)),
    "cu_seqlens negative": Invalid("packed", "cu_seqlens", int32(-1, 0, 17, 22, 22, 145, 150)),
    "cu_seqlens past the rows": Invalid("packed", "cu_seqlens", int32(0, 0, 17, 22, 22, 145, 151)),
    "cu_seqlens ends early": Invalid("packed", "cu_seqlens", int32(0, 0, 17, 22, 22, 145, 149)),
}

CASES = (
    OpCase(
        name="linear_attention",
        calls={
            "plain": linear_plain,
            "all_options": linear_all_options,
            "packed": linear_packed,
            "cross": linear_cross,
            "reversed": linear_reversed,
        },
        illegal=LINEAR_OPTIONS | {"num_segments": (-1, -INT64_MAX)},
        extreme={"scale": (0.0, -1.0), "eps": (0.0, 1e30), "num_segments": (INT32_MAX, INT64_MAX)},
        legal_changes=frozenset(
            {"packed: v.size(3)+1", "packed: cu_seqlens.size(0)+1", "cross: q.size(2)+1", "cross: q.size(2)=0"}
        ),
        growing={"q": 2, "k": 2, "v": 2},
        invalid=INVALID_DECAYS | INVALID_LINEAR_SEQUENCES,
        differentiable=("q", "k", "v", "log_decay", "initial_state"),
        has_backward=True,
        any_strides=frozenset({"log_decay", "initial_state"}),
    ),
    OpCase(
        name="linear_attention_states",
        calls={
            "plain": without(linear_plain, "q"),
            "all_options": without(linear_all_options, "q", "scale", "eps", "num_segments"),
            "packed": without(linear_packed, "q"),
            "reversed": without(linear_reversed, "q", "scale", "num_segments", "wide_out"),
        },
        legal_changes=frozenset({"packed: k.size(3)+1", "packed: v.size(3)+1", "packed: cu_seqlens.size(0)+1"}),
        growing={"k": 2, "v": 2},
        invalid=INVALID_DECAYS | INVALID_LINEAR_SEQUENCES,
        differentiable=("k", "v", "log_decay"),
        any_strides=frozenset({"log_decay", "initial_state"}),
    ),
    OpCase(
        name="linear_attention_decode",
        calls={"plain": decode_plain, "all_options": decode_all_options},
        illegal=LINEAR_OPTIONS,
        extreme={"scale": (0.0, -1.0), "eps": (0.0, 1e30)},
        legal_changes=frozenset(
            f"all_options: state{change}" for change in (".size(0)+1", ".size(0)=0", " huge in its first dim")
        ),
        growing={"q": 2, "k": 2, "v": 2},
        invalid=INVALID_DECAYS
        | {
            "state_indices past the slots": Invalid("all_options", "state_indices", int32(5, -1, 1)),
            "state_indices below -1": Invalid("all_options", "state_indices", int32(4, -2, 1)),
            "state_indices twice": Invalid("all_options", "state_indices", int32(4, -1, 4)),
            "commit negative": Invalid("all_options", "commit", int32(-1, 2, 0)),
            "commit past the tokens": Invalid("all_options", "commit", int32(1, 5, 0)),
        },
        any_strides=frozenset({"log_decay"}),
        mutates=("state",),
    ),
)
