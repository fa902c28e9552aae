"""Caches that give far keys positions of their own, against runs whose attention writes every position down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache_cases import CLOSE, LIMITED, decode, defined_run, generate, logits, make, ours, turned
from longctx.cache import InfLLMCache, SirLLMCache, load
from longctx.integrations.transformers import find_rope
from transformers_models import tiny, tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
PROMPT, LENGTH = 60, 90


def infllm(q: Tensor, k: Tensor, v: Tensor, scale: float, inv_freq: Tensor) -> Tensor:
    """Dense below the prompt's end; then what lies behind a window of 12 is 12 away, and 3 blocks of it are read."""
    index = torch.arange(LENGTH)
    row, key = index[:, None], index
    k_all, v_all = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    near = (key <= row) & (key > row - 12)
    local = (q @ k_all.mT * scale).masked_fill(~near, -torch.inf).softmax(-1)
    votes = local.sum(2).unflatten(1, (2, 2)).mean(2)
    q_far, k_far = turned(q, 12 - index, inv_freq), turned(k, -index, inv_freq)
    far = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    far[..., :5] = True
    for t in range(PROMPT, LENGTH):
        num_blocks = (t + 1 - 12) // 4
        best = votes[..., : 4 * num_blocks].unflatten(-1, (num_blocks, 4)).topk(2, dim=-1).indices
        blocks = k_far[:, :, : 4 * num_blocks].unflatten(2, (num_blocks, 4))
        stand_in = blocks.gather(3, best[..., None].expand(-1, -1, -1, -1, 16)).mean(3).repeat_interleave(2, 1)
        scores = (q_far[:, :, t, None] * stand_in).sum(-1).sum(1)
        scores[:, 0] = -torch.inf  # the first block is read anyway
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(3).indices, True)
        far[:, t, : 4 * num_blocks] |= picked.repeat_interleave(4, -1)
        far[:, t, 4 * num_blocks :] = True  # what fills no block yet
    far = (far & (key <= row - 12))[:, None]
    true, moved = q @ k_all.mT, q_far @ k_far.repeat_interleave(2, 1).mT
    weights = (torch.where(far, moved, true) * scale).masked_fill(~(near | far), -torch.inf)
    weights[:, :, :PROMPT] = (true * scale).masked_fill(key > row, -torch.inf)[:, :, :PROMPT]
    return weights.softmax(-1) @ v_all


@pytest.mark.parametrize("step", [1, 5, 15])
def test_infllm_puts_far_keys_at_one_distance(step: int) -> None:
    model, input_ids = ours(), tokens(2, LENGTH, seed=4)
    inv_freq = model.model.rotary_emb.inv_freq
    expected = defined_run(input_ids, lambda q, k, v, scale: infllm(q, k, v, scale, inv_freq))[:, PROMPT - 1 :]
    cache = make(model, "infllm with rope", LIMITED)
    torch.testing.assert_close(decode(model, input_ids, cache, PROMPT, step), expected[:, ::step], **CLOSE)
    true = decode(model, input_ids, make(model, "infllm", LIMITED), PROMPT, step)
    assert not torch.allclose(true, expected[:, ::step], atol=1e-2)


def test_infllm_within_the_window_is_dense() -> None:
    model, input_ids = ours(), tokens(2, 40, seed=3)
    cache = InfLLMCache(model.config, window_size=60, block_size=8, rope=find_rope(model))
    assert torch.equal(generate(model, input_ids, cache), generate(tiny("llama"), input_ids))


def test_infllm_follows_beams_and_forks() -> None:
    """Forks that part in the middle of a block, and rows that change places."""
    model, input_ids = ours(), tokens(2, LENGTH, seed=4)
    cache = make(model, "infllm with rope", LIMITED)
    decode(model, input_ids[:, :70], cache, PROMPT)
    fork = cache.fork()
    decode(model, tokens(2, 9, seed=8), fork, 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = decode(model, input_ids.flip(0)[:, 70:], cache, 1)
    fresh = make(model, "infllm with rope", LIMITED)
    expected = decode(model, input_ids.flip(0), fresh, PROMPT)[:, 11:]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert logits(model, input_ids[:, :1], fork).isfinite().all()


def in_the_cache(q: Tensor, k: Tensor, v: Tensor, scale: float, inv_freq: Tensor, seen: Tensor) -> Tensor:
    """Attention under the mask `seen` [batch, n, n], where positions count the keys that a token sees."""
    index = torch.arange(q.shape[2])
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    q_raw, k_raw = turned(q, -index, inv_freq), turned(k, -index, inv_freq)
    out = torch.zeros_like(q)
    for b, row in torch.cartesian_prod(*(torch.arange(n) for n in seen.shape[:2])).tolist():
        keys = index[seen[b, row]]
        places = torch.arange(len(keys))
        query = turned(q_raw[b, :, row : row + 1], places[-1:], inv_freq)
        weights = (query @ turned(k_raw[b][:, keys], places, inv_freq).mT * scale).softmax(-1)
        out[b, :, row] = (weights @ v[b][:, keys])[:, 0]
    return out


def test_sirllm_counts_positions_in_the_cache(tmp_path: Path) -> None:
    """Three turns, of which 25 tokens at most stay."""
    model, input_ids = ours(), tokens(2, 71, seed=1)
    inv_freq, rope = model.model.rotary_emb.inv_freq, find_rope(model)
    options = {"num_sink_tokens": 2, "num_entropy_tokens": 20, "num_recent_tokens": 3, "decay": 0.5}
    cache = SirLLMCache(model.config, **options, rope=rope)
    seen = torch.ones(2, 71, 71, dtype=torch.bool).tril()
    stays = torch.arange(40).expand(2, -1)
    for end in (40, 55, 70):
        if end > 40:
            entropy = cache.entropy.clone()
            entropy[:, :2] = entropy[:, -3:] = torch.inf
            stays = stays.gather(1, entropy.topk(25, dim=1).indices.sort().values)
            seen[:, end - 15 :, : end - 15] = torch.zeros_like(seen[:, 0, : end - 15]).scatter_(1, stays, True)[:, None]
            stays = torch.cat([stays, torch.arange(end - 15, end).expand(2, -1)], dim=1)
        cache.read(model, input_ids[:, : end + 1])
    expected = defined_run(input_ids, lambda q, k, v, scale: in_the_cache(q, k, v, scale, inv_freq, seen))[:, -1]
    cache.save(tmp_path / "cache")
    again = load(tmp_path / "cache", model.config, rope=rope)
    more = torch.cat([input_ids, tokens(2, 20, seed=9)], dim=1)
    for other in (cache.fork(), again, cache):
        torch.testing.assert_close(logits(model, input_ids[:, 70:], other), expected, **CLOSE)
    for other in (cache, again):
        other.entropy = torch.cat([other.entropy, torch.ones(2, 1)], dim=1)  # of the token that `read` did not see
        other.read(model, more)
    assert torch.equal(cache.layers[1].keys, again.layers[1].keys)
    assert cache.layers[1].keys.shape[2] == 25 + 19
