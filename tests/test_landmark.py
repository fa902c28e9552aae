"""Landmark Attention against the definition of its grouped softmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache_cases import CLOSE, defined_run, logits, ours, turned
from longctx.cache import LandmarkCache, load
from longctx.cache.landmark import landmark_attention
from longctx.integrations.transformers import find_rope
from op_case import randn
from transformers_models import padding, tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
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


def stingy(q: Tensor, k: Tensor, v: Tensor, num_blocks: int, scale: float, inv_freq: Tensor) -> Tensor:
    """The same with all keys at positions that the paper writes down, counted from the first of its prefix's places."""
    group, length = q.shape[1] // k.shape[1], k.shape[2]
    index = torch.arange(length)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q_raw, k_raw = turned(q, -index, inv_freq), turned(k, -index, inv_freq)
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        block, chunk = i // BLOCK, (num_blocks + 1) * BLOCK  # the own block begins behind the prefix
        query = turned(q_raw[b, h, i], torch.tensor(chunk + i % BLOCK), inv_freq)

        def score(keys: Tensor, at: Tensor, b: int = b, h: int = h, query: Tensor = query) -> Tensor:
            return turned(k_raw[b, h, keys], at, inv_freq) @ query * scale

        recent = {j: num_blocks + 1 - (block - j) for j in range(max(0, block - num_blocks), block)}  # to their places
        landmarks = {}
        for j in range(block):
            at = torch.tensor([recent.get(j, 0) * BLOCK + BLOCK - 1])
            landmarks[j] = float(score(torch.tensor([j * BLOCK + BLOCK - 1]), at))
        opened = sorted(sorted(landmarks, key=landmarks.__getitem__, reverse=True)[:num_blocks])
        old = [j for j in opened if j not in recent]
        places = {j: old.index(j) if j in old else num_blocks + 1 - len(opened) + opened.index(j) for j in opened}
        own = torch.arange(block * BLOCK, min(i + 1, block * BLOCK + BLOCK - 1))
        of_blocks = [score(j * BLOCK + index[:BLOCK], places[j] * BLOCK + index[:BLOCK]) for j in opened]
        first = torch.cat([score(own, chunk + own - block * BLOCK), *(x[-1:] for x in of_blocks)]).softmax(0)
        out[b, h, i] = first[: len(own)] @ v[b, h, own]
        for a, j, scores in zip(first[len(own) :], opened, of_blocks, strict=True):
            out[b, h, i] += a * (scores[:-1].softmax(0) @ v[b, h, j * BLOCK : j * BLOCK + BLOCK - 1])
    return out


@pytest.mark.parametrize("num_blocks", [2, 100])
@pytest.mark.parametrize("positions", ["true", "stingy"])
@torch.no_grad()
def test_a_model_with_landmarks(num_blocks: int, positions: str, tmp_path: Path) -> None:
    """Prompt, chunks, tokens and rewinding give the logits of one run of a model whose attention is the definition."""
    model, input_ids = ours(), tokens(2, 38, seed=5)
    inv_freq, handles = model.model.rotary_emb.inv_freq, {}

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if positions == "stingy" and num_blocks == 2:
            return stingy(q, k, v, num_blocks, scale, inv_freq)
        return grouped(q, k, v, num_blocks, scale)  # with every block open, stingy positions are the true ones

    if positions == "stingy":
        handles["rope"] = find_rope(model)
    expected = defined_run(input_ids, attention)
    cache = LandmarkCache(model.config, block_size=BLOCK, num_blocks=num_blocks, **handles)
    torch.testing.assert_close(model(input_ids[:, :21], **cache.as_argument()).logits, expected[:, :21], **CLOSE)
    torch.testing.assert_close(model(input_ids[:, 21:24], **cache.as_argument()).logits, expected[:, 21:24], **CLOSE)
    for i in range(24, 38):
        torch.testing.assert_close(logits(model, input_ids[:, i : i + 1], cache), expected[:, i], **CLOSE)
    cache.save(tmp_path / "cache")
    fork = cache.fork()
    logits(model, input_ids[:, :7], fork)  # writes behind what both have, a landmark among it
    for other in (cache, load(tmp_path / "cache", model.config, **handles), fork):
        other.rewind(10 + 7 * (other is fork))
        for i in range(28, 38):  # over a landmark that has been there before
            torch.testing.assert_close(logits(model, input_ids[:, i : i + 1], other), expected[:, i], **CLOSE)
    assert cache.stats().layers[0].tokens == 48
    cache.batch_select_indices(torch.tensor([1]))
    cache.rewind(1)
    torch.testing.assert_close(logits(model, input_ids[1:, 37:], cache), expected[1:, 37], **CLOSE)


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
