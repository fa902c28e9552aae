"""Caches that the tests run through the same life, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import longctx
from longctx.cache import LongctxCache, make_cache
from transformers_models import tiny

# Options with which a method reads every key.
UNLIMITED: dict[str, dict[str, Any]] = {
    "dense": {},
}
# Of these, the ones with static shapes.
STATIC = ("dense",)
# And those that forget nothing, so that they can be taken back.
LOSSLESS = ("dense",)
# Float32 logits of sdpa itself lie up to 6e-5 from those of a float64 model.
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def ours(name: str = "llama", **options: Any) -> PreTrainedModel:
    return longctx.apply(tiny(name, **options), "dense")


def unlimited(model: PreTrainedModel, name: str, **options: Any) -> LongctxCache:
    return make_cache(model.config, name, **{**UNLIMITED[name], **options})


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, cache: object = None, **options: Any) -> Tensor:
    """Of the last token."""
    return model(input_ids, past_key_values=cache, **options).logits[:, -1]


def generate(model: PreTrainedModel, input_ids: Tensor, cache: object = None, **options: Any) -> Tensor:
    return model.generate(input_ids, **{"past_key_values": cache, "max_new_tokens": 12, "do_sample": False, **options})
