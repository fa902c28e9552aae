"""TieredQuestCache: plain `generate()` over a page store; and the million-token script, made small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_cases import CLOSE, decode, generate, logits, masked_run, ours
from longctx.cache import TieredQuestCache
from longctx.store import PageGeometry, PageStore, PageStoreError
from transformers_models import padding, tiny, tokens

pytestmark = [
    pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
INPUT = tokens(2, 60)
SCRIPT = Path(__file__).parent.parent / "bench" / "million.py"


def make_store(model, directory, *, frames=40, device_frames=0, **options):
    geometry = PageGeometry.of(model.config, batch=2, page_size=4, dtype=torch.float32)
    return PageStore(
        geometry,
        path=directory / "kv",
        max_host_bytes=frames * geometry.page_bytes,
        max_device_bytes=device_frames * geometry.page_bytes,
        device="cpu",
        **options,
    )


def unlimited(model, store):
    return TieredQuestCache(model.config, store=store, budget=4096, num_first=4, num_last=4)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 25}], ids=["plain", "chunked"])
@pytest.mark.parametrize("device_frames", [0, 40])
def test_generates_what_the_dense_model_does(tmp_path, options, device_frames):
    """With a budget for every key, of which a fifth is in memory."""
    model = ours()
    with make_store(model, tmp_path, device_frames=device_frames) as store:
        cache = unlimited(model, store)
        assert torch.equal(generate(model, INPUT, cache, **options), generate(tiny("llama"), INPUT, **options))
        assert cache.get_seq_length() == store.num_tokens == 71
        assert store.stats.misses > 0
        # Nothing but the store has the prompt.
        assert not any(isinstance(value, torch.Tensor) for layer in cache.layers for value in vars(layer).values())
        assert all(layer._new is None for layer in cache.layers)


def test_budget_reads_the_pages_that_score_best(tmp_path):
    """Two pages of four keys, the first four keys and the last five; everything else is masked."""
    input_ids, prompt = tokens(2, 70, seed=1), 60

    def visible(q, k):
        mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
        for row in range(prompt, k.shape[2]):
            pages = k[:, :, : row + 1].split(4, dim=2)  # [batch, num_kv_heads, up to 4, head_dim]
            low, high = (torch.stack([bound(page, 2) for page in pages], dim=2) for bound in (torch.amin, torch.amax))
            x = q[:, :, row].unflatten(1, (k.shape[1], -1))[:, :, :, None]
            scores = torch.maximum(x * low[:, :, None], x * high[:, :, None]).sum(-1).amax(2)
            best = scores.topk(2, dim=-1).indices  # [batch, num_kv_heads, 2]
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True).repeat_interleave(4, dim=-1)
            mask[:, :, row, : row + 1] = chosen.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[..., : row + 1]
            mask[:, :, row, :4] = True
            mask[:, :, row, row - 4 :] = True
        return mask

    model, expected = ours(), masked_run(input_ids, prompt, visible)
    with make_store(model, tmp_path) as store:
        cache = TieredQuestCache(model.config, store=store, budget=8, num_first=4, num_last=5)
        torch.testing.assert_close(decode(model, input_ids, cache, prompt), expected, **CLOSE)
        assert cache.stats().layers[0].keys_read == 17 * 10


def test_rewind_drafts_and_reset(tmp_path):
    model, dense = ours(), tiny("llama")
    with make_store(model, tmp_path) as store:
        cache = unlimited(model, store)
        logits(model, INPUT[:, :30], cache)
        found = logits(model, INPUT[:, 30:34], cache)
        torch.testing.assert_close(found, logits(dense, INPUT[:, :34]), **CLOSE)
        cache.rewind(7)
        assert store.num_tokens == 27
        torch.testing.assert_close(logits(model, INPUT[:, 27:30], cache), logits(dense, INPUT[:, :30]), **CLOSE)
        torch.testing.assert_close(logits(model, INPUT[:, 30:], cache), logits(dense, INPUT), **CLOSE)
        cache.reset()
        torch.testing.assert_close(logits(model, INPUT[:, :9], cache), logits(dense, INPUT[:, :9]), **CLOSE)


def test_goes_on_from_a_file(tmp_path):
    model, dense = ours(), tiny("llama")
    with make_store(model, tmp_path) as store:
        logits(model, INPUT[:, :50], unlimited(model, store))
    with PageStore.open(tmp_path / "kv", max_host_bytes=1 << 16) as store:
        cache = unlimited(model, store)
        assert cache.get_seq_length() == 50
        found = [logits(model, INPUT[:, i : i + 1], cache) for i in range(50, 60)]
        torch.testing.assert_close(found[-1], logits(dense, INPUT), **CLOSE)


def test_full_store_leaves_the_cache_as_it_was(tmp_path):
    model = ours()
    geometry = PageGeometry.of(model.config, batch=2, page_size=4, dtype=torch.float32)
    lanes = geometry.num_lanes
    with PageStore(geometry, max_host_bytes=15 * lanes * geometry.page_bytes) as store:  # no disk: 60 tokens
        cache = unlimited(model, store)
        logits(model, INPUT[:, :58], cache)
        logits(model, INPUT[:, 58:], cache)
        with pytest.raises(PageStoreError, match="needs more `max_host_bytes` or a `path`"):
            logits(model, INPUT[:, :1], cache)
        assert cache.get_seq_length() == store.num_tokens == 60
        cache.rewind(1)
        expected = logits(tiny("llama"), INPUT)
        torch.testing.assert_close(logits(model, INPUT[:, 59:], cache), expected, **CLOSE)


def test_what_a_store_cannot_do_raises(tmp_path):
    model = ours()
    with make_store(model, tmp_path) as store:
        cache = unlimited(model, store)
        with pytest.raises(NotImplementedError, match="it takes no padding"):
            logits(model, INPUT, cache, attention_mask=padding([60, 23], "left"))
        with pytest.raises(ValueError, match=r"`k` of a page store must have shape"):
            logits(model, INPUT[:1], cache)
        assert cache.get_seq_length() == 0
        logits(model, INPUT, cache)
        with pytest.raises(NotImplementedError, match="cannot be reordered"):
            cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(NotImplementedError, match="cannot be forked"):
            cache.fork()
        with pytest.raises(NotImplementedError, match=r"store\.commit"):
            cache.save(tmp_path / "file")
        with pytest.raises(ValueError, match="`budget` must be at least 4; got 3"):
            TieredQuestCache(model.config, store=store, budget=3)
    other = PageGeometry(num_layers=7, num_kv_heads=2, head_dim=16)
    with (
        PageStore(other, max_host_bytes=1 << 24) as store,
        pytest.raises(ValueError, match="not of this model's geometry: it has num_layers 7"),
    ):
        TieredQuestCache(model.config, store=store)


def test_long_context_in_bounded_memory(tmp_path):
    """128 MiB of keys and values decode with 8 MiB of frames; every needle is found."""
    command = [sys.executable, str(SCRIPT), "--path", str(tmp_path), "--tokens", "65536", "--layers", "2"]
    command += ["--max-host-mib", "8", "--steps", "8", "--buffered"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["KV GiB"] == 0.125
    assert result["needles found"] == result["needles"] == 8
    assert result["peak beyond imports MiB"] < 64
    assert list(tmp_path.iterdir()) == []
