"""Policies that look at another policy while a model runs: how much softmax mass it keeps, and whether it is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from longctx.integrations import transformers as adapter
from longctx.prefill import AttentionContext, Dense, LMInfinite, Pattern, Policy
from longctx.prefill.coverage import coverage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attend = Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]
# Exactness is checked on every seventh row: all places within a block, at a seventh of the cost.
ROW_STEP = 7


@dataclass(frozen=True, kw_only=True, eq=False)
class Coverage(Policy):
    """Runs `inner` and notes the softmax mass that each row keeps."""

    name: ClassVar[str] = "_coverage"
    inner: Policy
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, policy: Policy) -> Coverage | None:
        return None if policy.changes_logits else cls(inner=policy)

    @property
    def mean(self) -> float:
        return float(torch.cat(self.rows).mean())

    @property
    def minimum(self) -> float:
        return float(torch.cat(self.rows).min())

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        self.rows.append(coverage(q, k, self.inner, **fields_of(context)).flatten())
        return self.inner.select(q, k, context)


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared(Policy):
    """Runs `inner` and notes how far each call is from `twin`, relative to the norm of the twin's result."""

    name: ClassVar[str] = "_compared"
    inner: Policy
    twin: Attend
    errors: list[float] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        return self.inner.select(q, k, context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        out, lse = self.inner.attend(q, k, v, context)
        expected = self.twin(q, k, v, context)
        self.errors.append(float((out[:, :, ::ROW_STEP].float() - expected).norm() / expected.norm()))
        return out, lse


def exactness(model: PreTrainedModel, policy: Policy, full: Policy | None, prompt: Tensor) -> dict[str, float]:
    """Largest relative error over the layers, against a masked dense run and, at full density, against dense."""
    probes = {"masked dense": Compared(inner=policy, twin=masked_dense(policy))}
    if full is not None:
        probes["full density"] = Compared(inner=full, twin=dense)
    for probe in probes.values():
        with adapter.using(model, probe, min_seqlen_q=1):
            model(prompt, use_cache=False, logits_to_keep=1)
    return {name: max(probe.errors) for name, probe in probes.items()}


def dense(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    return Dense().attend(q, k, v, context)[0][:, :, ::ROW_STEP].float()


def masked_dense(policy: Policy) -> Attend:
    """Attention from its formula, in float32 a head at a time, under the mask that `policy` selects."""

    def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        mask = policy.select(q, k, context).to_mask().expand(*q.shape[:2], -1, -1)[:, :, ::ROW_STEP]
        group_size = q.shape[1] // k.shape[1]
        out = torch.empty(*mask.shape[:3], v.shape[3])
        for head in range(q.shape[1]):
            q_head, k_head, v_head = (
                x.float() for x in (q[:, head], k[:, head // group_size], v[:, head // group_size])
            )
            scores = q_head[:, ::ROW_STEP] @ k_head.mT * scale(q, context)
            if isinstance(policy, LMInfinite):
                scores = ceiling_on_distance(scores, q_head, k_head, policy.window_size, context)
            weights = scores.masked_fill(~mask[:, head], -math.inf).softmax(dim=-1).nan_to_num()
            out[:, head] = weights @ v_head
        return out

    return attend


def ceiling_on_distance(scores: Tensor, q: Tensor, k: Tensor, limit: int, context: AttentionContext) -> Tensor:
    """LM-Infinite's scores, of every `ROW_STEP`-th row: keys `limit` or more away are scored as if at `limit`.

    A rotary pair is a complex number and RoPE a phase, so taking a position away is a product with its conjugate.
    """
    assert context.rope is not None
    positions = torch.arange(q.shape[1])[None]
    cos, sin = context.rope(positions)
    half = q.shape[2] // 2
    phase = torch.complex(cos, sin)[..., :half]
    at_zero = [torch.complex(*x.split(half, dim=-1)) * phase.conj() for x in (q, k)]
    q_far = at_zero[0][:, ::ROW_STEP] * torch.complex(*context.rope(torch.tensor([[limit]])))[..., :half]
    far = (q_far @ at_zero[1].conj().mT).real * scale(q, context)
    distance = positions[0, ::ROW_STEP, None] - positions
    return torch.where(distance >= limit, far, scores)


def scale(q: Tensor, context: AttentionContext) -> float:
    return q.shape[-1] ** -0.5 if context.softmax_scale is None else context.softmax_scale


def fields_of(context: AttentionContext) -> dict[str, Any]:
    return {name: getattr(context, name) for name in context.__dataclass_fields__}
