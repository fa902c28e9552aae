"""TieredQuestCache: plain `generate()` over a page store; and the million-token script, made small."""

import copy
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_cases import CLOSE, decode, generate, logits, masked_run, ours
from longctx.cache import TieredQuestCache, load, make_cache
from longctx.store import PageGeometry, PageStore, PageStoreError
from transformers_models import padding, tiny, tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
INPUT, MASK = tokens(2, 60), padding([60, 43], "left")
SCRIPT = Path(__file__).parent.parent / "bench" / "million.py"


def make_store(model, directory, *, frames=40, device_frames=0, batch=2, **options):
    geometry = PageGeometry.of(model.config, batch=batch, page_size=4, dtype=torch.float32)
    return PageStore(
        geometry,
        path=directory / "kv",
        max_host_bytes=frames * geometry.page_bytes,
        max_device_bytes=device_frames * geometry.page_bytes,
        device="cpu",
        **options,
    )


def unlimited(model, store, **options):
    return TieredQuestCache(model.config, store=store, budget=4096, num_first=4, num_last=4, **options)


def following(model, cache, start, end, mask=MASK):
    """Logits of the last of INPUT's tokens [start, end)."""
    mask = None if mask is None else mask[:, :end]
    return logits(model, INPUT[:, start:end], cache, attention_mask=mask)


def assert_follows(model, cache, start, end, mask=MASK):
    """As the dense model on all of INPUT's tokens up to `end`."""
    expected = following(tiny("llama"), None, 0, end, mask)
    torch.testing.assert_close(following(model, cache, start, end, mask), expected, **CLOSE)


@pytest.mark.parametrize(
    ("options", "store"),
    [
        ({}, {"device_frames": 40}),
        ({"prefill_chunk_size": 25}, {}),
        ({"attention_mask": MASK}, {"device_frames": 40}),
        ({"attention_mask": MASK, "prefill_chunk_size": 9}, {}),  # a whole chunk of padding; chunks that could decode
        ({"attention_mask": MASK, "num_beams": 3}, {"batch": 6, "frames": 120}),
        ({"num_beams": 2, "prompt": INPUT[:1]}, {"device_frames": 40}),
    ],
    ids=["plain", "chunked", "padded", "padded chunks", "padded beams", "beams on a device"],
)
def test_generates_what_the_dense_model_does(tmp_path, options, store):
    """With a budget for every key, of which a part is in memory."""
    model, prompt = ours(), options.pop("prompt", INPUT)
    with make_store(model, tmp_path, **store) as store:
        cache = unlimited(model, store)
        assert torch.equal(generate(model, prompt, cache, **options), generate(tiny("llama"), prompt, **options))
        assert cache.get_seq_length() == store.num_tokens == 71
        assert store.stats.misses > 0
        # Nothing but the store has the prompt.
        held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert all(value.dim() == 1 for value in held)
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


def test_forks_share_pages_and_part(tmp_path):
    """Rows of different lengths; either goes its own way, drafts and takes tokens back; the file has both."""
    model = ours()
    with make_store(model, tmp_path, batch=6, frames=140) as store:
        cache = unlimited(model, store)
        following(model, cache, 0, 30)
        used = store.stats.host_bytes
        forks = [cache.fork(), copy.deepcopy(cache)]
        assert [fork.sequences for fork in forks] == [[2, 3], [4, 5]]
        # Two layers, two heads, two rows, two forks: a partial page each, where the row has one.
        assert store.stats.host_bytes - used <= 16 * store.geometry.page_bytes
        with pytest.raises(PageStoreError, match=r"2 more sequences .* made for 6 \(`batch` of its geometry\)"):
            cache.fork()
        for fork in forks:
            assert_follows(model, fork, 30, 34)
            fork.rewind(6)
            assert_follows(model, fork, 28, 36)
        assert cache.get_seq_length() == 30
        assert_follows(model, cache, 30, 31)
        del fork, forks[1]
        again = cache.fork()
        assert again.sequences == [4, 5]
        again.save(tmp_path / "fork")
        forks[0].rewind(36)
        assert_follows(model, forks[0], 0, 20)
        for start, end in itertools.pairwise((31, 32, 36, 44, 60)):
            assert_follows(model, cache, start, end)
        del forks[0]
    with PageStore.open(tmp_path / "kv", max_host_bytes=1 << 16) as store:
        assert store.lengths.tolist() == [60, 43, 0, 0, 31, 14]
        assert_follows(model, load(tmp_path / "fork", model.config, store=store), 31, 34)
        cache = unlimited(model, store, sequences=[0, 1])
        cache.rewind(1)
        assert_follows(model, cache, 59, 60)


def test_batch_operations_and_files(tmp_path):
    model, dense = ours(), tiny("llama")
    with make_store(model, tmp_path, batch=5, frames=100) as store:
        cache = unlimited(model, store)
        following(model, cache, 0, 50)
        cache.batch_repeat_interleave(2)
        assert cache.sequences == [0, 2, 1, 3]
        cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        assert store.lengths.tolist() == [50, 33, 0, 33, 0]
        rows = [1, 0, 1]
        inputs, mask = INPUT[rows], MASK[rows]
        expected = logits(dense, inputs[:, :52], attention_mask=mask[:, :52])
        logits(model, inputs[:, 50:51], cache, attention_mask=mask[:, :51])
        cache.save(tmp_path / "cache")
        cache.options["budget"] = 5
        found = logits(model, inputs[:, 51:52], cache, attention_mask=mask[:, :52])
        torch.testing.assert_close(found, expected, **CLOSE)
        with pytest.raises(ValueError, match=r"has \[35, 52, 35\] tokens .* when it was saved it had \[34, 51, 34\]"):
            load(tmp_path / "cache", model.config, store=store)
        cache = unlimited(model, store, sequences=cache.sequences)
        cache.rewind(1)
    with PageStore.open(tmp_path / "kv", max_host_bytes=1 << 16) as store:
        cache = load(tmp_path / "cache", model.config, store=store)
        assert (cache.get_seq_length(), cache.options["budget"]) == (51, 4096)
        found = logits(model, inputs[:, 51:52], cache, attention_mask=mask[:, :52])
        torch.testing.assert_close(found, expected, **CLOSE)


def test_beams_with_a_budget_score_as_their_tokens_do_alone(tmp_path):
    """Whatever was reordered on the way, a beam has read the pages that its own tokens choose."""
    model, options = ours(), {"budget": 8, "num_first": 0, "num_last": 4}
    with make_store(model, tmp_path, batch=3, frames=60) as store:
        cache = TieredQuestCache(model.config, store=store, **options)
        beams = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
        found = generate(model, INPUT[:1], cache, **beams)
    (tmp_path / "alone").mkdir()
    with make_store(model, tmp_path / "alone", batch=3, frames=60) as store:
        cache = TieredQuestCache(model.config, store=store, **options)
        steps = decode(model, found.sequences, cache, 60)[:, :-1].log_softmax(-1)
    expected = steps.gather(2, found.sequences[:, 60:, None]).sum((1, 2)) / 12
    torch.testing.assert_close(found.sequences_scores, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(found.sequences[0], generate(tiny("llama"), INPUT[:1], num_beams=3)[0])  # the budget tells


def test_disk_full_in_the_middle_of_a_token(tmp_path):
    """The second layer has no room: the first one gives the token back, and with room again all goes on."""
    model = ours()
    with make_store(model, tmp_path) as store:
        cache = unlimited(model, store)
        following(model, cache, 0, 31)
        append, failed = store.layers[1].append, []

        def full(*arguments, **options):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
            try:
                append(*arguments, **options)
            except PageStoreError as error:
                failed.append(str(error))
                raise
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        store.layers[1].append = full
        with pytest.raises(PageStoreError, match="is full: page 7 of layer 1"):
            following(model, cache, 31, 35)
        assert len(failed) == 1
        assert [layer.seen for layer in cache.layers] == [31, 31]
        assert store.lengths.tolist() == [31, 14]
        del store.layers[1].append
        assert_follows(model, cache, 31, 35)
        assert_follows(model, cache, 35, 60)


def test_what_a_store_cannot_do_raises(tmp_path):
    model = ours()
    with make_store(model, tmp_path) as store:
        with pytest.raises(NotImplementedError, match="no static shapes: the host decides"):
            make_cache(model.config, "tiered_quest", store=store, max_cache_len=64)
        with pytest.raises(ValueError, match="`budget` must be at least 4; got 3"):
            TieredQuestCache(model.config, store=store, budget=3)
        with pytest.raises(ValueError, match=r"`sequences` must be distinct .* that has 2; got \[0, 2\]"):
            unlimited(model, store, sequences=[0, 2])
        cache = unlimited(model, store)
        with pytest.raises(PageStoreError, match="3 more sequences are needed"):
            logits(model, tokens(3, 9), cache)
        with pytest.raises(NotImplementedError, match="pad on the left"):
            logits(model, INPUT, cache, attention_mask=padding([60, 23], "right"))
        assert cache.get_seq_length() == 0
        following(model, cache, 0, 50)
        with pytest.raises(ValueError, match=r"`k` of a page store must have shape .* = \[2, 2, 1, 16\]"):
            logits(model, INPUT[:1, :1], cache)
        later = unlimited(model, store)
        assert later.sequences == [0, 1]
        with pytest.raises(ValueError, match="belong to another one now"):
            following(model, cache, 50, 51)
        assert_follows(model, later, 50, 60)
    geometry = PageGeometry.of(model.config, page_size=4, dtype=torch.float32)
    with (
        PageStore(geometry, max_host_bytes=1 << 20) as store,
        pytest.raises(NotImplementedError, match="without a `path` cannot be saved"),
    ):
        unlimited(model, store).save(tmp_path / "file")
    other = PageGeometry(num_layers=7, num_kv_heads=2, head_dim=16)
    with (
        PageStore(other, max_host_bytes=1 << 24) as store,
        pytest.raises(ValueError, match="not of this model's geometry: it has num_layers 7"),
    ):
        TieredQuestCache(model.config, store=store)


def test_long_context_in_bounded_memory(tmp_path):
    """128 MiB of keys and values decode with 8 MiB of frames; every needle is found."""
    command = [sys.executable, str(SCRIPT), "--path", str(tmp_path), "--tokens", "65536", "--layers", "2"]
    command += ["--max-host-mib", "8", "--steps", "4", "--buffered"]
    command += ["--queries", "topics", "--read-ahead", "8", "--far", "0.1"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["KV GiB"] == 0.125
    assert result["needles found"] == result["needles"] == 8
    assert result["peak beyond imports MiB"] < 64
    assert list(tmp_path.iterdir()) == []
