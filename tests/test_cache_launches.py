"""What a decoded token of a cache costs in launches on a GPU, counted on CPU fibers."""

from __future__ import annotations

import pytest
import torch

import longctx
from cache_cases import logits, ours
from op_case import randn
from transformers_models import tokens

pytestmark = pytest.mark.runs_on("simt", reason="counts launches: --simt")


@pytest.mark.parametrize("max_cache_len", [None, 1100], ids=["grows", "static"])
def test_quest(max_cache_len: int | None) -> None:
    """New keys with their pages, scores of the pages, the best of them, attention that 512 keys split in four."""
    model = ours("llama")
    config = model.config
    cache = longctx.cache.QuestCache(config, budget=512, num_dense_layers=0, max_cache_len=max_cache_len)
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, 1000, head_dim)
    cache.fill([(randn(*shape, seed=i), randn(*shape, seed=100 + i)) for i in range(config.num_hidden_layers)])
    for _ in range(2):
        before = torch.ops.longctx_simt.num_launches()
        logits(model, tokens(1, 1), cache)
        launches = torch.ops.longctx_simt.num_launches() - before
        assert launches == 4 * config.num_hidden_layers
