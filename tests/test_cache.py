"""What all caches share: generation as with the dense model, batch operations, forks, files, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import longctx
from cache_cases import CLOSE, LOSSLESS, STATIC, UNLIMITED, generate, logits, make, ours
from longctx.cache import DenseCache, LongctxLayer, load, make_cache
from transformers_models import padding, tiny, tokens

pytestmark = pytest.mark.runs_on("cpu", reason="caches are Python over ops that are tested everywhere")
INPUT, MASK = tokens(2, 40), padding([40, 23], "left")


@pytest.mark.parametrize("name", UNLIMITED)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": MASK},
        {"attention_mask": MASK, "num_beams": 3},
        {"attention_mask": MASK, "prefill_chunk_size": 20},
    ],
    ids=["plain", "padded", "beams", "chunked"],
)
def test_generates_what_the_dense_model_does(name: str, options: dict[str, Any]) -> None:
    model = ours()
    cache = make(model, name, UNLIMITED)
    assert torch.equal(generate(model, INPUT, cache, **options), generate(tiny("llama"), INPUT, **options))
    assert cache.get_seq_length() == 51
    assert cache.stats().layers[0].tokens == 11


@pytest.mark.parametrize("name", STATIC)
def test_static_shapes_and_compiled(name: str) -> None:
    """One graph for all steps, without a read on the host; padded rows too."""
    model = ours("qwen2", use_sliding_window=False, sliding_window=None)
    expected = generate(tiny("qwen2", use_sliding_window=False, sliding_window=None), INPUT, attention_mask=MASK)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for options in ({}, {"compile_config": compiled}):
        cache = make(model, name, UNLIMITED, max_cache_len=64)
        assert torch.equal(generate(model, INPUT, cache, attention_mask=MASK, **options), expected)
        assert cache.layers[0].keys.shape[2] == 64
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    with pytest.raises(RuntimeError, match="max_cache_len=64"):
        logits(model, tokens(2, 20), cache)


@pytest.mark.parametrize("name", LOSSLESS)
def test_crop_fork_rewind_and_drafts(name: str) -> None:
    model, dense = ours(), tiny("llama")
    cache = make(model, name, UNLIMITED)
    logits(model, INPUT[:, :30], cache, attention_mask=MASK[:, :30])
    past = {}
    for fork in (cache.fork(), copy.deepcopy(cache)):
        past[fork] = logits(model, INPUT[:, 30:34], fork, attention_mask=MASK[:, :34])  # four tokens at once
    expected = logits(dense, INPUT[:, :34], attention_mask=MASK[:, :34])
    for fork, found in past.items():
        torch.testing.assert_close(found, expected, **CLOSE)
        fork.rewind(6)
        found = logits(model, INPUT[:, 28:36], fork, attention_mask=MASK[:, :36])
        torch.testing.assert_close(found, logits(dense, INPUT[:, :36], attention_mask=MASK[:, :36]), **CLOSE)
        assert fork.get_seq_length() == 36
    assert cache.get_seq_length() == 30
    found = logits(model, INPUT[:, 30:31], cache, attention_mask=MASK[:, :31])
    torch.testing.assert_close(found, logits(dense, INPUT[:, :31], attention_mask=MASK[:, :31]), **CLOSE)
    repeated = tokens(1, 6).repeat(1, 6)  # whose continuation a look-up guesses, partly wrong
    speculative = generate(model, repeated, make(model, name, UNLIMITED), prompt_lookup_num_tokens=4)
    assert torch.equal(speculative, generate(dense, repeated))
    cache.reset()
    assert torch.equal(generate(model, INPUT, cache), generate(dense, INPUT))


@pytest.mark.parametrize("name", UNLIMITED)
def test_batch_operations_and_files(name: str, tmp_path: Path) -> None:
    model, dense = ours(), tiny("llama")
    cache = make(model, name, UNLIMITED)
    logits(model, INPUT, cache, attention_mask=MASK)
    logits(model, INPUT[:, :1], cache, attention_mask=padding([41, 24], "left"))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    assert cache.batch_size == 3
    rows, mask = torch.cat([INPUT, INPUT[:, :1]], 1)[[1, 0, 1]], padding([42, 25], "left")[[1, 0, 1]]
    expected = logits(dense, torch.cat([rows, INPUT[[0, 1, 0], :1]], 1), attention_mask=mask)
    cache.save(tmp_path / "cache.safetensors")
    loaded = load(tmp_path / "cache.safetensors", model.config)
    assert (type(loaded), loaded.options) == (type(cache), cache.options)
    for one in (cache, loaded):
        torch.testing.assert_close(logits(model, INPUT[[0, 1, 0], :1], one, attention_mask=mask), expected, **CLOSE)


def test_grows_without_a_copy_per_token() -> None:
    """What `update` returns is a view of one buffer, which moves a few times in a thousand tokens."""
    layer = LongctxLayer(ours().config, 0)
    new = torch.randn(1, 2, 1, 16)
    places = set()
    for _ in range(1000):
        keys, values = layer.update(new, new)
        layer._awaiting = False
        layer.commit(1)
        places.add(keys.untyped_storage().data_ptr())
    assert keys.shape == values.shape == (1, 2, 1000, 16)
    assert torch.equal(keys, new.expand_as(keys))
    assert len(places) <= 12


@pytest.mark.parametrize("max_cache_len", [None, 4096])
def test_rows_of_different_lengths_are_written_in_place(max_cache_len: int | None) -> None:
    """Not even inside an op does a token of a padded batch copy the keys before it, as scatter_ does in 16 bits."""
    model = ours(num_hidden_layers=1).bfloat16()
    cache = DenseCache(model.config, max_cache_len=max_cache_len)
    logits(model, tokens(2, 1000), cache, attention_mask=padding([1000, 900], "left"))
    new = torch.randn(2, 2, 1, 16, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        keys, _ = cache.layers[0].update(new, new)
    assert torch.equal(keys[0, :, 1000], new[0, :, 0])
    assert torch.equal(keys[1, :, 900], new[1, :, 0])
    shapes = [shape for event in profile.events() for shape in event.input_shapes if event.name == "aten::copy_"]
    assert max((torch.Size(shape).numel() for shape in shapes), default=0) <= new.numel()


def test_forks_share_until_both_write() -> None:
    model = ours()
    cache = DenseCache(model.config)
    logits(model, INPUT, cache)
    fork = cache.fork()
    logits(model, INPUT[:, :1], fork)  # the first to append does so in place
    assert fork.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    logits(model, INPUT[:, 1:2], cache)
    assert fork.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()
    assert torch.equal(fork.layers[0].keys[:, :, :40], cache.layers[0].keys[:, :, :40])
    assert not torch.equal(fork.layers[0].keys[:, :, 40], cache.layers[0].keys[:, :, 40])


def test_filled_from_elsewhere() -> None:
    model, dense = ours(), tiny("llama")
    theirs, cache = DynamicCache(config=dense.config), DenseCache(model.config)
    logits(dense, INPUT, theirs)
    cache.fill([(layer.keys, layer.values) for layer in theirs.layers])
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(logits(model, INPUT[:, :1], cache), logits(dense, INPUT[:, :1], theirs), **CLOSE)


def test_offload_and_stats() -> None:
    model = ours()
    cache = DenseCache(model.config)
    logits(model, INPUT, cache)
    cache.layers[0].offload()
    logits(model, INPUT[:, :2], cache)
    assert cache.stats().share == 1.0
    assert str(cache.stats()).splitlines()[1].split() == ["0", "2", "42.0", "42.0"]


def test_errors_leave_the_cache_unchanged() -> None:
    model = ours()
    cache = DenseCache(model.config)
    logits(model, INPUT, cache)
    keys = cache.layers[0].keys.clone()

    def refused(error: type[Exception], match: str, model: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            logits(model, *args, cache, **options)
        assert cache.get_seq_length() == 40
        assert torch.equal(cache.layers[0].keys, keys)

    refused(ValueError, r"holds keys .* = \[2, 2, '\*', 16\] torch.float32; got \[1, 2, 1, 16\]", model, INPUT[:1, :1])
    refused(ValueError, "from the config of another model", ours(), INPUT[:, :1])
    refused(NotImplementedError, "pad on the left", model, INPUT, attention_mask=padding([80, 75], "right"))
    gap = torch.cat([torch.ones(2, 40), padding([8, 5], "left")], 1).long()
    refused(NotImplementedError, "pad on the left", model, INPUT[:, :8], attention_mask=gap)
    refused(NotImplementedError, "output_attentions", model, INPUT[:, :1], output_attentions=True)
    longctx.integrations.transformers.remove(model)
    refused(ValueError, "running on attn_implementation='longctx'.*'sdpa'", model, INPUT[:, :1])
    longctx.apply(model, "dense")
    refused(ValueError, "takes minus the number", lambda *_, **__: cache.crop(3), INPUT)
    refused(ValueError, "between 0 and the 40 tokens", lambda *_, **__: cache.rewind(41), INPUT)
    expected = logits(tiny("llama"), torch.cat([INPUT, INPUT[:, :1]], 1))
    torch.testing.assert_close(logits(model, INPUT[:, :1], cache), expected, **CLOSE)


def test_refused_when_made() -> None:
    config = ours().config
    with pytest.raises(ValueError, match=r"`name` must be one of .*dense.*; got 'quset'"):
        make_cache(config, "quset")
    with pytest.raises(ValueError, match="`max_cache_len` must be at least 1"):
        make_cache(config, "dense", max_cache_len=0)
    with pytest.raises(NotImplementedError, match="`sliding_window` = 16"):
        DenseCache(tiny("mistral").config)
    with pytest.raises(NotImplementedError, match="layer types full_attention, sliding_attention"):
        DenseCache(tiny("gemma2").config)
    with pytest.raises(NotImplementedError, match="deepseek_v3"):
        DenseCache(tiny("deepseek_v3").config)


def test_keys_that_never_reach_attention() -> None:
    """The config says longctx, but the model that uses the cache has another one."""
    config, model = ours().config, tiny("llama")
    cache = DenseCache(config)
    logits(model, INPUT, cache)
    with pytest.raises(ValueError, match="never came to longctx's attention function"):
        logits(model, INPUT[:, :1], cache)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    model = ours()
    (tmp_path / "weights").mkdir()
    model.save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match="a file that a cache saved"):
        load(tmp_path / "weights" / "model.safetensors", model.config)
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        DenseCache(model.config, max_cache_len=8).save(tmp_path / "cache")
