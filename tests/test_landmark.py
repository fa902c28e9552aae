"""Landmark Attention against the definition of its grouped softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cache_cases import CLOSE, logits, ours
from longctx.cache import LandmarkCache
from longctx.cache.landmark import landmark_attention
from op_case import randn
from transformers_models import padding, tiny, tokens

pytestmark = [
    pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
BLOCK = 5


def grouped(q: Tensor, k: Tensor, v: Tensor, num_blocks: int, scale: float) -> Tensor:
    """Row by row: a softmax of own tokens and landmarks, times one of each landmark's other tokens."""
    group, length = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    probability = torch.zeros_like(scores)
    is_landmark = torch.arange(length) % BLOCK == BLOCK - 1
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row, position = scores[b, h, i], length - q.shape[2] + i
        own = torch.zeros(length, dtype=torch.bool)
        own[position // BLOCK * BLOCK : position + 1] = True
        own &= ~is_landmark
        landmarks = range(BLOCK - 1, position // BLOCK * BLOCK, BLOCK)
        opened = sorted(landmarks, key=lambda m, row=row: -float(row[m]))[:num_blocks]
        first = own.clone()
        first[opened] = True
        a = row.masked_fill(~first, -torch.inf).softmax(0)
        probability[b, h, i] = a.masked_fill(~own, 0.0)
        for m in opened:
            rest = slice(m - BLOCK + 1, m)
            probability[b, h, i, rest] = a[m] * row[rest].softmax(0)
    return probability @ v


@pytest.mark.parametrize(("seqlen_q", "n"), [(1, 3), (1, 23), (1, 25), (4, 31), (31, 31), (7, 40), (12, 12)])
@pytest.mark.parametrize("num_blocks", [1, 3, 100])
def test_equals_grouped_softmax(seqlen_q: int, n: int, num_blocks: int) -> None:
    q, k = (randn(1, heads, length, 16, dtype=torch.float64, seed=n) for heads, length in ((4, seqlen_q), (2, n)))
    v = randn(1, 2, n, 24, dtype=torch.float64, seed=1)
    out, lse = landmark_attention(3 * q, k, v, block_size=BLOCK, num_blocks=num_blocks, softmax_scale=0.5)
    expected = grouped(3 * q, k, v, num_blocks, 0.5)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)  # landmarks' logits are float32
    assert lse.isfinite().all()


@pytest.mark.parametrize("num_blocks", [2, 100])
@torch.no_grad()
def test_a_model_with_landmarks(num_blocks: int) -> None:
    """Prompt, chunks, tokens and rewinding give the logits of one run of a model whose attention is the definition."""

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _: object, scaling: float, **__: object) -> Any:
        return grouped(q, k, v, num_blocks, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register("grouped", attention)
    AttentionMaskInterface.register("grouped", lambda *_, **__: None)
    input_ids = tokens(2, 38, seed=5)
    expected = tiny("llama", attn_implementation="grouped")(input_ids).logits
    model = ours()
    cache = LandmarkCache(model.config, block_size=BLOCK, num_blocks=num_blocks)
    torch.testing.assert_close(model(input_ids[:, :21], past_key_values=cache).logits, expected[:, :21], **CLOSE)
    torch.testing.assert_close(model(input_ids[:, 21:24], past_key_values=cache).logits, expected[:, 21:24], **CLOSE)
    for i in range(24, 38):
        torch.testing.assert_close(logits(model, input_ids[:, i : i + 1], cache), expected[:, i], **CLOSE)
    fork = cache.fork()
    fork.rewind(10)
    torch.testing.assert_close(logits(model, input_ids[:, 28:29], fork), expected[:, 28], **CLOSE)
    assert cache.stats().layers[0].tokens == 38


def test_padding_is_refused() -> None:
    model = ours()
    cache = LandmarkCache(model.config, block_size=BLOCK)
    with pytest.raises(NotImplementedError, match="Landmark Attention takes no padding"):
        logits(model, tokens(2, 20, seed=5), cache, attention_mask=padding([20, 11], "left"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 1}, "`block_size` must be at least 2; got 1"),
        ({"num_blocks": 0}, "`num_blocks` must be at least 1; got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LandmarkCache(ours().config, **options)
