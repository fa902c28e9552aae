"""Queries, keys and values as a model makes them: the constructed model's second layer on the demo's prompt.

Needs any transformers with an `AttentionInterface`, not the versions that longctx's adapter supports.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "longctx_capture"
LAYER = 1


@functools.cache
def captured_qkv(length: int, device: str, num_heads: int = 32, num_kv_heads: int = 8) -> dict[str, Any]:
    """q, k and v [1, heads, length, 128], bfloat16, contiguous."""
    from transformers import AttentionInterface

    from longctx.demo.task import needle_task

    heads = {"dtype": "bfloat16", "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    task = needle_task(heads, length=length, sweep_length=2048, depths=())
    captured: dict[str, Any] = {}

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx == LAYER:
            captured.update(q=query.contiguous(), k=key.contiguous(), v=value.contiguous())
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, capture)
    model = task.model.load()
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        model.to(device).model(  # type: ignore[arg-type]
            torch.tensor([task.main.prompt], device=device), use_cache=False
        )
    return captured
