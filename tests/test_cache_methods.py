"""Each method with a budget, against a dense run that is masked by its definition, and its options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache_cases import CLOSE, LIMITED, decode, generate, handles, logits, make, masked_run, mass, ours
from longctx.cache import InfLLMCache, QuestCache, RecycledCache, SirLLMCache, SnapKVCache, StreamingCache, load
from longctx.integrations.transformers import find_rope
from transformers_models import padding, tiny, tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
PROMPT = 60
INPUT = tokens(2, PROMPT + 10, seed=1)


def by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Mean over the query heads of each kv head."""
    return x.unflatten(1, (num_kv_heads, -1)).mean(2)


def chosen(scores: Tensor, k: int) -> Tensor:
    """The k best of each row as a mask."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, dim=-1).indices, True)


@pytest.mark.parametrize("name", LIMITED)
def test_rows_of_a_padded_batch_decode_as_alone(name: str) -> None:
    model = ours()
    mask = padding([PROMPT, 41], "left")
    cache = make(model, name, LIMITED)
    batch = generate(model, INPUT[:, :PROMPT], cache, attention_mask=mask, max_new_tokens=30)
    assert cache.stats().share < 0.9
    for row, length in ((0, PROMPT), (1, 41)):
        alone = INPUT[row : row + 1, PROMPT - length : PROMPT]
        expected = generate(model, alone, make(model, name, LIMITED), max_new_tokens=30)
        assert torch.equal(batch[row, PROMPT:], expected[0, length:])


def test_streaming_sees_sinks_and_window() -> None:
    """Long enough for keys to be dropped, several times; several tokens a call too."""
    model, input_ids = ours(), tokens(2, 160, seed=2)

    def visible(q: Tensor, k: Tensor) -> Tensor:
        row, key = torch.arange(160)[:, None], torch.arange(160)
        return ((key < 3) | (key > row - 20)).expand(2, 4, -1, -1).clone()

    expected = masked_run(input_ids, PROMPT, visible)
    cache = StreamingCache(model.config, num_sink_tokens=3, window_size=20)
    torch.testing.assert_close(decode(model, input_ids, cache, PROMPT), expected, **CLOSE)
    assert cache.layers[0].keys.shape[2] < 45
    assert cache.get_seq_length() == 160
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="dropped keys cannot be cropped"):
        cache.rewind(1)
    cache = StreamingCache(model.config, num_sink_tokens=3, window_size=20)
    torch.testing.assert_close(decode(model, input_ids, cache, PROMPT, step=10), expected[:, ::10], **CLOSE)


def test_streaming_counts_positions_in_the_cache(tmp_path: Path) -> None:
    """One layer: a long text gives what its first and last tokens give next to each other."""
    model = ours(num_hidden_layers=1)
    rope = find_rope(model)
    input_ids = tokens(2, 100, seed=3)
    cache = StreamingCache(model.config, num_sink_tokens=3, window_size=20, rope=rope)
    found = decode(model, input_ids, cache, 20)[:, -1]
    expected = logits(model, torch.cat([input_ids[:, :3], input_ids[:, -20:]], dim=1))
    torch.testing.assert_close(found, expected, **CLOSE)
    true = decode(model, input_ids, StreamingCache(model.config, num_sink_tokens=3, window_size=20), 20)[:, -1]
    assert not torch.allclose(true, expected, atol=1e-2)
    cache.save(tmp_path / "cache")
    again = [logits(model, input_ids[:, :1], c) for c in (load(tmp_path / "cache", model.config, rope=rope), cache)]
    assert torch.equal(*again)


def test_snapkv_keeps_what_the_end_of_the_prompt_looks_at() -> None:
    model = ours()

    def visible(q: Tensor, k: Tensor) -> Tensor:
        votes = by_kv_head(sum(mass(q, k, row)[..., :PROMPT] for row in range(PROMPT - 10, PROMPT)), 2)
        pooled = torch.nn.functional.avg_pool1d(votes, 5, stride=1, padding=2)
        pooled[..., -10:] = float("inf")
        seen = torch.ones(2, 2, 70, dtype=torch.bool)
        seen[..., :PROMPT] = chosen(pooled, 30)
        return seen.repeat_interleave(2, 1)[:, :, None].repeat(1, 1, 70, 1)

    expected = masked_run(INPUT, PROMPT, visible)
    cache = SnapKVCache(model.config, budget=30, window_size=10)
    torch.testing.assert_close(decode(model, INPUT, cache, PROMPT), expected, **CLOSE)
    assert cache.layers[1].keys.shape == (2, 2, 40, 16)


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("head_reduce", ["group_max", "group_mean", "none"])
@pytest.mark.parametrize("static", [{}, {"max_cache_len": 75}], ids=["growing", "static"])
def test_quest_reads_the_pages_that_could_score_best(head_reduce: str, step: int, static: dict[str, int]) -> None:
    model = ours()

    def visible(q: Tensor, k: Tensor) -> Tensor:
        keys = k.repeat_interleave(2, 1)
        seen = torch.zeros(2, 4, 70, 70, dtype=torch.bool)
        for row in range(PROMPT, 70):
            pages = keys[:, :, : row + 1].split(4, dim=2)
            x = q[:, :, row]
            bounds = torch.stack([torch.maximum(x * p.amin(2), x * p.amax(2)).sum(-1) for p in pages], dim=-1)
            if head_reduce != "none":
                group = bounds.unflatten(1, (2, 2))
                bounds = (group.amax(2) if head_reduce == "group_max" else group.mean(2)).repeat_interleave(2, 1)
            bounds[..., -1] = float("inf")
            picked = chosen(bounds, 6).repeat_interleave(4, -1)[..., : row + 1]
            seen[:, :, row, : row + 1] = picked
        return seen

    expected = masked_run(INPUT, PROMPT, visible)[:, ::step]
    cache = QuestCache(model.config, budget=24, page_size=4, num_dense_layers=0, head_reduce=head_reduce, **static)
    torch.testing.assert_close(decode(model, INPUT, cache, PROMPT, step), expected, **CLOSE)
    assert static or cache.stats().layers[1].keys_read == 10 * 24


def test_quest_summaries_follow_rewinds_and_forks() -> None:
    """A cache that went another way before has the bits of one that did not."""
    model = ours()
    cache = make(model, "quest", LIMITED)
    decode(model, INPUT, cache, PROMPT)
    cache.rewind(7)  # into the middle of a page that was full
    other = tokens(2, 20, seed=5)
    forks = [cache.fork(), cache]
    for fork, tail in zip(forks, (other, INPUT[:, PROMPT + 3 :]), strict=True):
        fresh = make(model, "quest", LIMITED)
        decode(model, INPUT[:, : PROMPT + 3], fresh, PROMPT)
        for part in tail.split(1, dim=1):
            assert torch.equal(logits(model, part, fork), logits(model, part, fresh))


@pytest.mark.parametrize("name", LIMITED)
def test_files_hold_what_a_method_knows(name: str, tmp_path: Path) -> None:
    model = ours()
    cache = make(model, name, LIMITED)
    decode(model, INPUT[:, :63], cache, PROMPT)
    cache.save(tmp_path / "cache")
    loaded = load(tmp_path / "cache", model.config, **handles(model, name))
    for part in INPUT[:, 63:].split(1, dim=1):
        assert torch.equal(logits(model, part, loaded), logits(model, part, cache))


def test_infllm_reads_the_blocks_whose_representatives_score_best() -> None:
    """Masses of a window of 12 choose 2 of the 4 keys of a block; 3 blocks are read, from the second on."""
    model, input_ids = ours(), tokens(2, 90, seed=4)

    def visible(q: Tensor, k: Tensor) -> Tensor:
        keys, length = k.repeat_interleave(2, 1), 90
        row, key = torch.arange(length)[:, None], torch.arange(length)
        near = (key <= row) & (key > row - 12)
        local = (q @ keys.transpose(2, 3) * 0.25).masked_fill(~near, float("-inf")).softmax(-1)
        votes = by_kv_head(local.sum(2), 2)
        seen = torch.zeros(2, 4, length, length, dtype=torch.bool)
        seen[..., :5] = True
        for t in range(PROMPT, length):
            num_blocks = (t + 1 - 12) // 4
            best = votes[..., : 4 * num_blocks].unflatten(-1, (num_blocks, 4)).topk(2, dim=-1).indices
            blocks = k[:, :, : 4 * num_blocks].unflatten(2, (num_blocks, 4))
            stand_in = blocks.gather(3, best[..., None].expand(-1, -1, -1, -1, 16)).mean(3).repeat_interleave(2, 1)
            scores = (q[:, :, t, None] * stand_in).sum(-1).sum(1)
            scores[:, 0] = float("-inf")
            picked = chosen(scores, 3).repeat_interleave(4, -1)
            seen[:, :, t, : 4 * num_blocks] |= picked[:, None]
            seen[:, :, t, max(0, t - 14) : t + 1] = True
        return seen

    expected = masked_run(input_ids, PROMPT, visible)
    for step in (1, 5):
        cache = make(model, "infllm", LIMITED)
        torch.testing.assert_close(decode(model, input_ids, cache, PROMPT, step), expected[:, ::step], **CLOSE)
    with pytest.raises(NotImplementedError, match="InfLLM cache cannot be cropped"):
        cache.rewind(1)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_recycled_recycles(reduce: str) -> None:
    """Full steps at 60, 65, 70; between them what they found, and the tokens since."""
    model = ours()

    def visible(q: Tensor, k: Tensor) -> Tensor:
        seen = torch.ones(2, 4, 70, 70, dtype=torch.bool)
        for full in (60, 65):
            votes = mass(q, k, full)[..., : full + 1].unflatten(1, (2, 2))
            votes = votes.mean(2) if reduce == "mean" else votes.amax(2)
            seen[:, :, full + 1 : full + 5, : full + 1] = chosen(votes, 20).repeat_interleave(2, 1)[:, :, None]
        return seen

    expected = masked_run(INPUT, PROMPT, visible)
    cache = RecycledCache(model.config, budget=20, stride=4, reduce=reduce)
    torch.testing.assert_close(decode(model, INPUT, cache, PROMPT), expected, **CLOSE)
    assert cache.stats().layers[0].keys_read == 61 + 21 + 22 + 23 + 24 + 66 + 21 + 22 + 23 + 24


def test_recycled_takes_a_full_step_when_queries_turn_away() -> None:
    model = ours()
    reads = {}
    for similarity in (None, -1.0, 1.01):
        cache = RecycledCache(model.config, budget=20, stride=50, similarity=similarity)
        decode(model, INPUT, cache, PROMPT)
        reads[similarity] = cache.stats().layers[0].keys_read
    assert reads[None] == reads[-1.0] == 61 + sum(20 + since for since in range(1, 10))
    assert reads[1.01] == sum(range(61, 71))


def test_sirllm_keeps_surprises() -> None:
    """Two turns and the tokens between, against entropies of a dense run and a dense run masked by them."""
    model = ours()
    cache = SirLLMCache(model.config, num_sink_tokens=2, num_entropy_tokens=20, num_recent_tokens=3, decay=0.5)
    cache.read(model, INPUT[:, :40])
    options = {"logits_processor": [cache.processor()], "max_new_tokens": 6}
    text = generate(model, INPUT[:, :40], cache, **options)
    dense = tiny("llama")
    with torch.no_grad():
        log_probs = dense(text).logits.log_softmax(-1)
    entropy = -log_probs[:, :-1].gather(2, text[:, 1:, None])[..., 0]
    assert torch.isinf(cache.entropy[:, 0]).all()
    torch.testing.assert_close(cache.entropy[:, 1:], entropy[:, :44], **CLOSE)  # the last token was not read yet

    text = torch.cat([text, INPUT[:, 40:50]], dim=1)
    cache.read(model, text)
    assert cache.get_seq_length() == 55
    assert cache.layers[0].keys.shape[2] == 25 + 10
    old = torch.cat([entropy.new_full((2, 1), float("inf")), entropy[:, :44]], dim=1) * 0.5
    scores = old.clone()
    scores[:, :2] = scores[:, -3:] = float("inf")
    kept = chosen(scores, 25)
    torch.testing.assert_close(cache.entropy[:, :25], old[kept].view(2, 25), **CLOSE)

    def visible(q: Tensor, k: Tensor) -> Tensor:
        seen = torch.ones(2, 4, 56, 56, dtype=torch.bool)
        seen[:, :, 45:, :45] = kept[:, None, None]
        return seen

    torch.testing.assert_close(logits(model, text[:, 55:], cache), masked_run(text, 45, visible)[:, -1], **CLOSE)
    cache = SirLLMCache(model.config, num_entropy_tokens=20)
    cache.read(model, INPUT[:, :40])
    generate(model, INPUT[:, :40], cache)  # without the processor
    with pytest.raises(ValueError, match="entropy of 39 of 51 tokens; pass each turn to `read`"):
        cache.read(model, INPUT)


@pytest.mark.parametrize(
    ("cls", "options", "match"),
    [
        (StreamingCache, {"window_size": 0}, "`window_size` must be at least 1; got 0"),
        (StreamingCache, {"num_sink_tokens": -1}, "`num_sink_tokens` must be at least 0; got -1"),
        (SnapKVCache, {"pool_size": 4}, "`pool_size` must be odd and at least 1; got 4"),
        (SnapKVCache, {"budget": 60}, "`budget` must be at least 64; got 60"),
        (SirLLMCache, {"decay": 0.0}, "`decay` must be above 0 and at most 1; got 0.0"),
        (QuestCache, {"budget": 100}, "`budget` must be a multiple of `page_size` = 16; got 100"),
        (QuestCache, {"head_reduce": "max"}, "`head_reduce` must be 'none', 'group_max', .*; got 'max'"),
        (InfLLMCache, {"num_blocks": 0}, "`num_blocks` must be at least 1; got 0"),
        (RecycledCache, {"stride": 0}, "`stride` must be at least 1; got 0"),
        (RecycledCache, {"reduce": "sum"}, "`reduce` must be 'mean' or 'max'; got 'sum'"),
    ],
)
def test_options_out_of_range(cls: type, options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(ours().config, **options)
