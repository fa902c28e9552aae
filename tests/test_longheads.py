"""LongHeads against its definition, with positions that count what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache_cases import CLOSE, decode, defined_run, logits, ours, turned
from longctx.cache import LongHeadsCache, load
from longctx.integrations.transformers import find_rope
from transformers_models import padding, tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
PROMPT, LENGTH, CHUNK, CHUNKS = 43, 62, 5, 4


def longheads(q: Tensor, k: Tensor, v: Tensor, scale: float, inv_freq: Tensor) -> Tensor:
    """Dense below the prompt's end; then row by row, head by head."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    index = torch.arange(length)
    out = (q @ k.mT * scale).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf).softmax(-1) @ v
    q_raw, k_raw = turned(q, -index, inv_freq), turned(k, -index, inv_freq)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        chunks = [slice(c * CHUNK, (c + 1) * CHUNK) for c in range(-(-length // CHUNK))]
        features = []
        for c in chunks[: length // CHUNK]:
            message = ((q[b, h, c] @ k[b, h, c].T * scale).softmax(-1) @ v[b, h, c]).mean(0)
            inside = turned(k_raw[b, h, c], torch.arange(CHUNK), inv_freq)
            features.append((message @ inside.T * scale).softmax(-1) @ inside)
        for row in range(PROMPT, length):
            own = row // CHUNK
            best = sorted(range(1, own - 1), key=lambda c, row=row: -float(q_raw[b, h, row] @ features[c]))
            read = [*sorted({0, own - 1, *best[: CHUNKS - 3]}), own]
            keys = torch.cat([index[chunks[c]] for c in read])
            keys = keys[keys <= row]
            places = torch.arange(len(keys))
            query = turned(q_raw[b, h, row : row + 1], places[-1:], inv_freq)[0]
            weights = (turned(k_raw[b, h, keys], places, inv_freq) @ query * scale).softmax(0)
            out[b, h, row] = weights @ v[b, h, keys]
    return out


@torch.no_grad()
def test_heads_read_the_chunks_they_choose(tmp_path: Path) -> None:
    model = ours()
    inv_freq = model.model.rotary_emb.inv_freq
    input_ids = tokens(2, LENGTH, seed=6)
    expected = defined_run(input_ids, lambda q, k, v, scale: longheads(q, k, v, scale, inv_freq))[:, PROMPT - 1 :]
    rope = find_rope(model)
    cache = LongHeadsCache(model.config, rope=rope, chunk_size=CHUNK, num_chunks=CHUNKS)
    torch.testing.assert_close(decode(model, input_ids[:, :55], cache, PROMPT), expected[:, :13], **CLOSE)
    cache.save(tmp_path / "cache")
    fork, again = cache.fork(), load(tmp_path / "cache", model.config, rope=rope)
    for other in (cache, fork, again):
        torch.testing.assert_close(
            model(input_ids[:, 55:], **other.as_argument()).logits, expected[:, 13:], **CLOSE
        )  # several tokens in a call, which complete a chunk
    assert cache.stats().share < 0.5


def test_a_short_text_is_read_whole() -> None:
    """Chunks that are all read stand where they are."""
    model = ours()
    input_ids = tokens(2, 40, seed=7)
    cache = LongHeadsCache(model.config, rope=find_rope(model), chunk_size=CHUNK, num_chunks=8)
    torch.testing.assert_close(decode(model, input_ids, cache, 3)[:, -1], logits(model, input_ids), **CLOSE)


def test_refusals() -> None:
    model = ours()
    cache = LongHeadsCache(model.config, rope=find_rope(model), chunk_size=CHUNK, num_chunks=3)
    with pytest.raises(NotImplementedError, match="LongHeads takes no padding"):
        logits(model, tokens(2, 20, seed=5), cache, attention_mask=padding([20, 11], "left"))
    cache = LongHeadsCache(model.config, rope=find_rope(model), chunk_size=CHUNK, num_chunks=3)
    logits(model, tokens(2, 20, seed=5), cache)
    with pytest.raises(NotImplementedError, match="LongHeads cache cannot be cropped"):
        cache.rewind(1)
    for options, match in (({"chunk_size": 0}, "`chunk_size` must be"), ({"num_chunks": 2}, "`num_chunks` must be")):
        with pytest.raises(ValueError, match=match):
            LongHeadsCache(model.config, rope=find_rope(model), **options)
