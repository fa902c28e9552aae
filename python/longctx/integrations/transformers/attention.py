"""The registered attention function: one call of a layer, by its policy or dense."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longctx.cache.base import LAYER, LongctxLayer
from longctx.integrations.transformers.rope import Rope, key_positions
from longctx.integrations.transformers.stats import LayerCounts
from longctx.integrations.transformers.unsupported import refuse_unsupported
from longctx.ops import attention
from longctx.prefill import AttentionContext, Dense, Policy
from longctx.prefill.cost import Lengths

# Where a layer keeps its state. A plain attribute survives deepcopy and torch.compile, and is not saved.
STATE = "_longctx"
# The state its last forward in training used: backward re-runs a checkpointed layer, perhaps after `using` ended.
FORWARD_STATE = "_longctx_forward"


@dataclass(eq=False)
class LayerState:
    """What `apply` leaves on an attention module."""

    policy: Policy
    min_seqlen_q: int
    rope: Rope | None
    counts: LayerCounts = field(default_factory=LayerCounts)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the signature of transformers' `AttentionInterface`.

    Args:
        query: `[batch, num_q_heads, seqlen_q, head_dim]`; key and value are what the cache returned, with
            `num_kv_heads` heads.
        attention_mask: `key_ranges` of the registered mask function, or None for plain causal attention.
        sliding_window: already part of `attention_mask` where that is given.
        s_aux: one more logit a head, without a value (gpt-oss).

    Returns:
        out `[batch, seqlen_q, num_q_heads, head_dim_v]`, and no attention weights.
    """
    cached: LongctxLayer | None = getattr(key, LAYER, None)
    if cached is not None:
        cached.arrive(module)
    refuse_unsupported(module, query.shape[2], attention_mask, dropout, kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)
    if cached is not None:
        _require_plain(is_causal, sliding_window)
        attention_mask = cached.begin(query.shape[2], attention_mask)
    options = {
        **_predicate(attention_mask, is_causal, sliding_window),
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    if cached is not None and cached.decodes(query.shape[2]):
        context = cached.context(query.shape[2], **_known(options, position_ids))
        out = cached.attend(query, key, value, context)
        cached.commit(query.shape[2])
        return out.transpose(1, 2).contiguous(), None
    state, counted = _state(module)
    why_dense = _why_dense(state, is_causal, query.shape[2], key.shape[2], sliding_window)
    if state is None or why_dense:
        out, _ = attention(query, key, value, **options)
        if state is not None and counted and not torch.compiler.is_compiling():
            state.counts.add_dense(why_dense)
    else:
        layer_idx = getattr(module, "layer_idx", None)
        out = _sparse(state, counted, query, key, value, options, layer_idx, position_ids)
    if cached is not None:
        cached.finish(query, **_known(options, position_ids))
    return out.transpose(1, 2).contiguous(), None


def _require_plain(is_causal: bool, sliding_window: int | None) -> None:
    if not is_causal or sliding_window is not None:
        raise NotImplementedError(
            "longctx: a cache serves layers that are causal and see the whole past; got "
            f"is_causal={is_causal}, sliding_window={sliding_window}"
        )


def _known(options: dict[str, Any], position_ids: Tensor | None) -> dict[str, Any]:
    """What a cache's layer is told besides where its keys lie."""
    scores = {name: options[name] for name in ("softmax_scale", "softcap", "sinks")}
    return {**scores, "position_ids": position_ids}


def _predicate(key_ranges: Tensor | None, is_causal: bool, sliding_window: int | None) -> dict[str, Any]:
    """What dense attention of this layer sees, as keywords of `longctx.attention`."""
    if key_ranges is not None:
        return {"causal": False, "key_ranges": key_ranges}  # which already end where they must
    if sliding_window is None:
        return {"causal": is_causal}
    if not is_causal:
        raise NotImplementedError(
            "longctx: a bidirectional layer with `sliding_window` needs the mask that transformers builds for it; "
            "got attention_mask=None"
        )
    return {"causal": True, "window_size_left": sliding_window - 1}


def _state(module: nn.Module) -> tuple[LayerState | None, bool]:
    """The layer's state, and whether this call counts."""
    state: LayerState | None = getattr(module, STATE, None)
    if torch.compiler.is_compiling():
        return state, True
    if torch._C._current_graph_task_id() != -1:  # inside backward: a checkpointed layer is recomputed
        return getattr(module, FORWARD_STATE, state), False
    if module.training:
        setattr(module, FORWARD_STATE, state)
    return state, True


def _why_dense(
    state: LayerState | None, is_causal: bool, seqlen_q: int, seqlen_k: int, sliding_window: int | None
) -> str:
    """Why this call does not go through a policy; empty if it does. Shapes decide, and the policy's budgets."""
    if state is None:
        return "no policy"
    if isinstance(state.policy, Dense):
        return "policy"
    if not is_causal:
        return "not causal"
    if seqlen_q < state.min_seqlen_q:
        return f"seqlen_q < {state.min_seqlen_q}"
    window_size_left = -1 if sliding_window is None else sliding_window - 1
    return state.policy.why_dense(Lengths(seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_size_left=window_size_left))


@torch.compiler.disable  # a compiled model runs its policies between two graphs, and its decoding in one
def _sparse(
    state: LayerState,
    counted: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    layer_idx: int | None,
    position_ids: Tensor | None,
) -> Tensor:
    context = _context(options, layer_idx)
    if state.rope is not None:
        positions = _positions(context, position_ids, query, key)
        context = dataclasses.replace(context, rope=state.rope, positions=positions)
    policy = state.policy
    pattern = policy.select(query, key, context)
    if type(policy).attend is Policy.attend:
        out, _ = pattern.attend(query, key, value, context)
    else:
        out, _ = policy.attend(query, key, value, context)
    if counted:
        state.counts.add_sparse(policy.name, pattern.density())
    return out


def _context(options: dict[str, Any], layer_idx: int | None) -> AttentionContext:
    """`options` of a causal layer, as a policy wants them: with the place of the queries, which the ranges hide."""
    key_ranges: Tensor | None = options.get("key_ranges")
    if key_ranges is not None:
        # K may reach beyond the last query, whose last range ends behind its own key.
        options = {**options, "causal": True, "seqused_k": key_ranges[:, -1, -1, 1].contiguous()}
    return AttentionContext(**options, layer_idx=layer_idx)


def _positions(context: AttentionContext, position_ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """RoPE position of every key, for policies that move keys."""
    if position_ids is None:
        raise NotImplementedError(
            "longctx: a policy that needs RoPE needs `position_ids`, which this model does not pass"
        )
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if seqlen_q < seqlen_k and context.key_ranges is not None and context.key_ranges.shape[1] == 2:
        raise NotImplementedError(
            "longctx: a policy that needs RoPE cannot tell the positions of cached keys before a gap of padding; pad "
            "the first turn on the left, or use another policy"
        )
    return key_positions(position_ids, query.shape[0], seqlen_k, context.seqused_k)
