"""Puts a policy on the attention layers of a model, and takes it off again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn
from transformers import PreTrainedModel

from longctx.integrations.transformers.attention import FORWARD_STATE, STATE, LayerState
from longctx.integrations.transformers.registration import NAME
from longctx.integrations.transformers.rope import find_rope
from longctx.integrations.transformers.stats import LayerStats, Stats
from longctx.prefill import PerLayer, Policy, get_policy

# Where the text model keeps the implementation that `remove` restores.
PREVIOUS = "_longctx_previous"
# The one model whose linear attention is replaced too.
MINIMAX = "transformers.models.minimax.modeling_minimax"


def apply(model: PreTrainedModel, policy: str | Policy, *, min_seqlen_q: int = 1024) -> PreTrainedModel:
    """Runs the attention of a transformers model on longctx, prefill by `policy`.

    The lightning layers of a MiniMax model run on `longctx.linear_attention`, whatever the policy.

    Args:
        model: any transformers model whose attention goes through `AttentionInterface`. Of a multimodal model, the
            text model is changed and the rest left alone.
        policy: a `Policy`, or its name and options (``"flexprefill:gamma=0.9"``). ``"dense"`` only swaps kernels.
        min_seqlen_q: calls with fewer queries than this run dense: decoding, assisted decoding, short prompts. So do
            calls of which the policy would keep nearly everything, by its budgets (`Policy.why_dense`).

    Returns:
        `model` itself, changed in place. A second call replaces the policy and starts new statistics.

    Raises:
        ValueError: the model's attention cannot be replaced.
        NotImplementedError: the policy needs RoPE, and the model's is not covered.

    Example:
        >>> import longctx, transformers
        >>> model = transformers.AutoModelForCausalLM.from_pretrained(path)  # doctest: +SKIP
        >>> longctx.apply(model, "flexprefill")  # doctest: +SKIP
    """
    if min_seqlen_q < 1:
        raise ValueError(f"longctx: `min_seqlen_q` must be at least 1; got {min_seqlen_q}")
    policy = get_policy(policy)
    text_model, layers = _text_model(model), _attention_layers(model)
    per_layer = {name: _policy_of(policy, module) for name, module in layers.items()}
    needs_rope = {name: "rope" in layer_policy.needs for name, layer_policy in per_layer.items()}
    rope = find_rope(text_model) if any(needs_rope.values()) else None

    previous = text_model.config._attn_implementation
    if previous != NAME:
        text_model.set_attn_implementation(NAME)
        if text_model.config._attn_implementation != NAME:  # transformers only logs a refusal
            raise ValueError(
                f"longctx: {type(text_model).__name__} does not route its attention through transformers' "
                "AttentionInterface, so it cannot be replaced; use a model that does, or call the ops directly"
            )
        setattr(text_model, PREVIOUS, previous)
    for name, module in layers.items():
        state = LayerState(per_layer[name], min_seqlen_q, rope if needs_rope[name] else None)
        setattr(module, STATE, state)
    minimax = _minimax()
    if minimax is not None:
        minimax.switch(text_model, on=True)
    return model


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `apply`: removes the policies, and restores the attention implementation the model had before."""
    for module in model.modules():
        for attribute in (STATE, FORWARD_STATE):
            module.__dict__.pop(attribute, None)
    minimax = _minimax()
    if minimax is not None:
        minimax.switch(model, on=False)
    text_model = _text_model(model)
    previous = text_model.__dict__.pop(PREVIOUS, None)
    if previous is not None:
        text_model.set_attn_implementation(previous)
    return model


@contextmanager
def using(model: PreTrainedModel, policy: str | Policy, *, min_seqlen_q: int = 1024) -> Iterator[PreTrainedModel]:
    """`apply` inside a `with` block; afterwards the model is as it was. Read `stats(model)` inside the block."""
    text_model, layers = _text_model(model), _attention_layers(model)
    if (
        text_model.config._attn_implementation != NAME
        and torch.is_grad_enabled()
        and model.training
        and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        raise ValueError(
            "longctx: gradient checkpointing re-runs attention in backward, when the `with` block may be over; use "
            f"`apply(model, policy)`, or load the model with attn_implementation={NAME!r}"
        )
    states = {name: getattr(module, STATE, None) for name, module in layers.items()}
    was_applied = text_model.config._attn_implementation == NAME
    try:
        yield apply(model, policy, min_seqlen_q=min_seqlen_q)
    finally:
        if not was_applied:
            remove(model)
        for name, module in layers.items():
            if states[name] is not None:
                setattr(module, STATE, states[name])
            else:
                module.__dict__.pop(STATE, None)


def stats(model: PreTrainedModel) -> Stats:
    """What every attention layer ran since `apply`: calls, sparse or dense and why, density, layers never reached.

    Dense calls inside a graph of torch.compile, and the re-runs of gradient checkpointing, are not counted.
    """
    layers = []
    for name, module in model.named_modules():
        state = getattr(module, STATE, None)
        if state is not None:
            layer_idx = getattr(module, "layer_idx", None)
            layers.append(LayerStats.of(name, layer_idx, state.policy.name, state.counts))
    if not layers:
        raise ValueError("longctx: no policy is applied to this model; call longctx.apply(model, policy) first")
    return Stats(tuple(layers))


def _policy_of(policy: Policy, module: nn.Module) -> Policy:
    """What a policy that differs between layers does in this one."""
    while isinstance(policy, PerLayer):
        policy = policy.policy_of(getattr(module, "layer_idx", None))
    return policy


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The outermost part of `model` that is built from its text config alone: the model itself, if not multimodal."""
    text_config = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is text_config:
            return module
    raise ValueError(f"longctx: {type(model).__name__} has no part that is built from its text config")


def _attention_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules of the text model by name: those that know their config and their layer index."""
    text_config = model.config.get_text_config()
    layers = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and hasattr(module, "layer_idx")
        and getattr(module, "config", None) is text_config
    }
    minimax = _minimax()
    if not layers and not (minimax and minimax.count(model)):
        raise ValueError(f"longctx: {type(model).__name__} has no layers that transformers' AttentionInterface serves")
    return layers


def _minimax() -> ModuleType | None:
    """The adapter for MiniMax; None where transformers' own is not imported, so that no model can be one."""
    return importlib.import_module("longctx.integrations.transformers.minimax") if MINIMAX in sys.modules else None
