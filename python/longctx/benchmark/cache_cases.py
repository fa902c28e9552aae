"""The measured case of caches: decoding after a long prompt, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.benchmark.case import BF16, Case, Contenders, partial

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 8, 2, 128


def _model(dtype: torch.dtype, attn_implementation: str) -> Any:
    """A random Llama whose weights are read in about the time of 32k keys a layer and kv head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=2 * HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
        initializer_range=0.005,  # logits so small that the check of every case holds for them
        eos_token_id=None,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attn_implementation
    )
    return model.eval()


def _generate(length: int, dtype: torch.dtype, *, kind: str, num_tokens: int, **chosen: int) -> Contenders:
    """`num_tokens` tokens behind a cache of `length` that was filled directly; every turn starts from there."""
    from transformers import DynamicCache

    from longctx.cache.cache import CACHE_NAME

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (1, length + 1), generator=generator)
    stock, ours = _model(dtype, "sdpa"), longctx.apply(_model(dtype, "longctx"), "dense")
    dynamic, cache = DynamicCache(config=stock.config), longctx.cache.make_cache(ours.config, kind, **chosen)
    shape = (1, KV_HEADS, length, HEAD_DIM)
    for index in range(LAYERS):
        keys, values = (torch.empty(shape, dtype=dtype).normal_(generator=generator) for _ in range(2))
        dynamic.update(keys, values, index)
        cache.layers[index].fill(keys, values)

    def run(model: Any, cache: Any) -> Callable[[], Tensor]:
        options = {"max_new_tokens": num_tokens, "do_sample": False, "disable_compile": True}
        told = {"output_logits": True, "return_dict_in_generate": True}

        def generate() -> Tensor:
            result = model.generate(ids, **{CACHE_NAME: cache}, **options, **told)
            cache.crop(length - cache.get_seq_length())
            return result.logits[0]  # type: ignore[no-any-return]

        return generate

    nbytes = float(
        num_tokens * (sum(p.nbytes for p in ours.parameters()) + 2 * LAYERS * 2048 * KV_HEADS * HEAD_DIM * 2)
    )
    return Contenders({"longctx": run(ours, cache), "DynamicCache + sdpa": run(stock, dynamic)}, 0.0, nbytes)


CASES = [
    Case(
        f"8 tokens by {title}, 8 layers of GQA 8/2, D=128",
        "generate",
        65536,
        BF16,
        partial(_generate, kind=kind, num_tokens=8, **options),
        {"DynamicCache + sdpa": goals} if goals else {},
    )
    for title, kind, options, goals in (
        ("quest", "quest", {}, (3.0, 8.0)),
        ("quest, no layer dense", "quest", {"num_dense_layers": 0}, (3.0, 8.0)),
        ("dense", "dense", {}, None),
    )
]
