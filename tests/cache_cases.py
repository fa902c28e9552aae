"""Caches that the tests run through the same life, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import longctx
from longctx.cache import LongctxCache, make_cache
from longctx.cache.cache import CACHE_NAME
from longctx.integrations.transformers import find_rope
from transformers_models import tiny

INFLLM = {"num_initial_tokens": 5, "window_size": 12, "block_size": 4, "num_blocks": 3, "num_representative": 2}
# Options with which a method reads every key.
UNLIMITED: dict[str, dict[str, Any]] = {
    "dense": {},
    "infllm": {"window_size": 20, "block_size": 4, "num_blocks": 100},
    "quest": {"budget": 1000, "page_size": 4, "num_dense_layers": 0},
    "recycled": {"budget": 1000, "stride": 3},
    "sirllm": {},
    "snapkv": {"budget": 1000},
    "squeezed": {"sparsity": 0.0, "window_size": 5},
    "streaming": {"window_size": 1000},
}
# Options with which it does not, of a prompt of 60 tokens.
LIMITED: dict[str, dict[str, Any]] = {
    "infllm": INFLLM,
    "infllm with rope": INFLLM,
    "quest": {"budget": 24, "page_size": 4, "num_dense_layers": 1},
    "recycled": {"budget": 20, "stride": 4},
    "snapkv": {"budget": 30, "window_size": 10},
    "squeezed": {"sparsity": 0.7, "clusters": 0.3, "window_size": 10},
    "streaming": {"num_sink_tokens": 3, "window_size": 20},
}
# Those with static shapes.
STATIC = ("dense", "quest", "streaming")
# Those that forget nothing, so that they can be taken back.
LOSSLESS = ("dense", "quest", "recycled", "sirllm", "squeezed")
# Float32 logits of sdpa itself lie up to 6e-5 from those of a float64 model.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def ours(name: str = "llama", **options: Any) -> PreTrainedModel:
    return longctx.apply(tiny(name, **options), "dense")


def make(model: PreTrainedModel, name: str, table: dict[str, dict[str, Any]], **options: Any) -> LongctxCache:
    """The cache of this name in the table; one "with rope" is the method at positions of its own."""
    return make_cache(model.config, name.split()[0], **{**table[name], **options, **handles(model, name)})


def handles(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What a file of this cache does not hold."""
    return {"rope": find_rope(model)} if name.endswith("with rope") else {}


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, cache: object = None, **options: Any) -> Tensor:
    """Of the last token."""
    return model(input_ids, **{CACHE_NAME: cache}, **options).logits[:, -1]


def generate(model: PreTrainedModel, input_ids: Tensor, cache: object = None, **options: Any) -> Tensor:
    return model.generate(input_ids, **{CACHE_NAME: cache, "max_new_tokens": 12, "do_sample": False, **options})


def decode(model: PreTrainedModel, input_ids: Tensor, cache: object, num_prompt: int, step: int = 1) -> Tensor:
    """Logits [batch, calls, vocab]: of the prompt, then of each `step` tokens."""
    parts = [input_ids[:, :num_prompt], *input_ids[:, num_prompt:].split(step, dim=1)]
    return torch.stack([logits(model, part, cache) for part in parts], dim=1)


@torch.no_grad()
def defined_run(
    input_ids: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    *,
    name: str = "llama",
    **options: Any,
) -> Tensor:
    """Logits of all tokens, of one run whose attention is `attention(q, k, v, scale)` over the whole text."""

    def registered(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _: object, scaling: float, **__: object) -> Any:
        return attention(q, k, v, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register("defined", registered)
    AttentionMaskInterface.register("defined", lambda *_, **__: None)
    result: Tensor = tiny(name, attn_implementation="defined", **options)(input_ids).logits
    return result


def masked_run(
    input_ids: Tensor, num_prompt: int, visible: Callable[[Tensor, Tensor], Tensor], *, name: str = "llama"
) -> Tensor:
    """Logits of the last prompt token and of every later one, of one dense run that is masked as a method says.

    `visible(q, k)` gives the mask [batch, num_q_heads, seqlen, seqlen] of a layer, which counts below the prompt.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length, group = q.shape[2], q.shape[1] // k.shape[1]
        mask = visible(q, k)
        mask[:, :, :num_prompt] = True
        mask &= torch.ones(length, length, dtype=torch.bool).tril()
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return weights @ v.repeat_interleave(group, 1)

    return defined_run(input_ids, attention, name=name)[:, num_prompt - 1 :]


def turned(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """`x` [..., n, dim], moved by so many positions [..., n]: pairs (d, d + dim / 2) as complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    pairs = pairs * torch.polar(torch.ones(()).double(), positions.double()[..., None] * inv_freq.double())
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


def mass(q: Tensor, k: Tensor, row: int) -> Tensor:
    """Softmax of query `row` over the keys up to it: [batch, num_q_heads, seqlen], zero behind."""
    group = q.shape[1] // k.shape[1]
    scores = (q[:, :, row : row + 1] @ k.repeat_interleave(group, 1).transpose(2, 3))[:, :, 0] * q.shape[3] ** -0.5
    scores[..., row + 1 :] = float("-inf")
    return scores.softmax(-1)
