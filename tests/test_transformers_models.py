"""Logits and generated tokens of tiny models on our dense kernels, against the models' own attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from longctx.integrations.transformers import apply, stats
from transformers_models import MORE_NAMES, NAMES, WINDOW, padding, tiny, tokens

LENGTH = 50  # three windows
# Float32 logits of sdpa itself lie up to 6e-5 from those of a float64 model.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def pair(name: str, **options: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model on its own attention, and on ours."""
    model = tiny(name, **options)
    return model, apply(copy.deepcopy(model), "dense", min_seqlen_q=8)


def logits(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids, **options).logits


def assert_ours_ran(model: PreTrainedModel) -> None:
    table = stats(model)
    assert len(table.layers) == 2
    assert table.never_reached == ()


@pytest.mark.parametrize("name", NAMES + MORE_NAMES)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits(name: str, side: str | None) -> None:
    theirs, ours = pair(name)
    input_ids = tokens(2, LENGTH)
    attention_mask = None if side is None else padding([LENGTH, 31], side)
    expected = logits(theirs, input_ids, attention_mask=attention_mask)
    got = logits(ours, input_ids, attention_mask=attention_mask)
    is_token = slice(None) if attention_mask is None else attention_mask.bool()
    torch.testing.assert_close(got[is_token], expected[is_token], **CLOSE)
    assert_ours_ran(ours)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_documents_do_not_leak(name: str) -> None:
    theirs, ours = pair(name)
    lengths = (30, 1, 19)
    input_ids = tokens(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = logits(ours, input_ids, position_ids=position_ids, use_cache=False)
    alone = [logits(theirs, document, use_cache=False) for document in input_ids.split(lengths, dim=1)]
    torch.testing.assert_close(got, torch.cat(alone, dim=1), **CLOSE)


@pytest.mark.parametrize("name", NAMES + MORE_NAMES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("turns", [(11, 5, 1), (40, 9, 1, 20)], ids=["short", "long"])
def test_cached_turns(name: str, cache: str, turns: tuple[int, ...]) -> None:
    """A second turn attends to the first through the cache, before and after windows are full."""
    theirs, ours = pair(name)
    input_ids = tokens(2, sum(turns))
    attention_mask = padding([sum(turns), sum(turns) - 6], "left")
    is_token = attention_mask.bool()

    def run(model: PreTrainedModel) -> Tensor:
        length = 80
        config = model.config
        past = StaticCache(config=config, max_cache_len=length) if cache == "static" else DynamicCache(config=config)
        out, seen = [], 0
        for turn in input_ids.split(turns, dim=1):
            seen += turn.shape[1]
            out.append(logits(model, turn, past_key_values=past, attention_mask=attention_mask[:, :seen]))
        return torch.cat(out, dim=1)

    torch.testing.assert_close(run(ours)[is_token], run(theirs)[is_token], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_second_turn_of_a_right_padded_batch(name: str) -> None:
    """The padding of the first turn becomes a gap in front of the second."""
    theirs, ours = pair(name)
    attention_mask = torch.cat([padding([20, 14], "right"), torch.ones(2, 9, dtype=torch.int64)], dim=1)
    input_ids, position_ids = tokens(2, 29), (attention_mask.cumsum(1) - 1).clamp(min=0)

    def run(model: PreTrainedModel) -> Tensor:
        past = DynamicCache()  # not sliding: both turns stay
        first = {"attention_mask": attention_mask[:, :20], "position_ids": position_ids[:, :20]}
        logits(model, input_ids[:, :20], past_key_values=past, **first)
        second = {"attention_mask": attention_mask, "position_ids": position_ids[:, 20:]}
        return logits(model, input_ids[:, 20:], past_key_values=past, **second)

    torch.testing.assert_close(run(ours), run(theirs), **CLOSE)


GENERATION = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 13},
    "chunked static": {"prefill_chunk_size": 13, "cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", list(GENERATION))
def test_generate(name: str, how: str) -> None:
    theirs, ours = pair(name)
    input_ids = tokens(2, LENGTH)
    attention_mask = padding([LENGTH, 38], "left")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": attention_mask, **GENERATION[how]}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected, got = theirs.generate(input_ids, **options), ours.generate(input_ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)
    assert_ours_ran(ours)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_assisted_generation(name: str) -> None:
    theirs, ours = pair(name)
    assistant = tiny(name, num_hidden_layers=1)
    input_ids = tokens(1, LENGTH)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = theirs.generate(input_ids, **options)
    assert torch.equal(ours.generate(input_ids, assistant_model=assistant, **options), expected)
    assert torch.equal(theirs.generate(input_ids, assistant_model=apply(assistant, "dense"), **options), expected)


def test_compiled_decoding() -> None:
    """`generate` with a static cache compiles the decoding step to one graph."""
    theirs, ours = pair("mistral")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    options["attention_mask"] = padding([LENGTH, 38], "left")
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    expected = theirs.generate(tokens(2, LENGTH), **options)
    assert torch.equal(ours.generate(tokens(2, LENGTH), compile_config=compile_config, **options), expected)
    assert [layer.calls for layer in stats(ours).layers] == [1, 1]  # the prefill; graphs are not counted


def test_window_is_applied_once() -> None:
    """The first key a query no longer sees is the one `sliding_window` positions back."""
    _, ours = pair("mistral", num_hidden_layers=1)
    input_ids = tokens(1, LENGTH)
    changed = input_ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 90 + 2
    same = (logits(ours, input_ids) == logits(ours, changed)).all(-1)[0]
    assert not same[10 : 10 + WINDOW].any()
    assert same[:10].all()
    assert same[10 + WINDOW :].all()


def test_window_argument_counts_only_without_a_mask() -> None:
    """Mistral and Phi-3 pass `sliding_window` beside a mask that contains it."""
    layer = tiny("mistral").model.layers[0].self_attn
    q, k, v = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16)
    forward = transformers.AttentionInterface._global_mapping["longctx"]
    i = torch.arange(30)
    for mask, first in ((None, i - 4), (torch.stack([i * 0, i + 1], dim=-1).int()[None, None], i * 0)):
        visible = (i <= i[:, None]) & (i >= first[:, None])
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        got, _ = forward(layer, q, k, v, mask, sliding_window=5)
        torch.testing.assert_close(got, expected.transpose(1, 2))


def test_bfloat16() -> None:
    theirs, ours = (model.bfloat16() for model in pair("llama"))
    exact = logits(tiny("llama"), tokens(2, LENGTH))
    error = [(logits(model, tokens(2, LENGTH)).float() - exact).norm() for model in (ours, theirs)]
    assert error[0] < 1.5 * error[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_forward(reentrant: bool) -> None:
    theirs, ours = pair("llama")
    input_ids = tokens(2, LENGTH)
    expected = logits(theirs, input_ids)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.train()
    torch.testing.assert_close(logits(ours, input_ids), expected, **CLOSE)
    torch.testing.assert_close(ours(input_ids).logits, expected, **CLOSE)
    assert [layer.calls for layer in stats(ours).layers] == [2, 2]


def test_is_causal_false_is_honoured() -> None:
    theirs, ours = pair("llama")
    input_ids, attention_mask = tokens(2, LENGTH), padding([LENGTH, 31], "right")
    for mask in (None, attention_mask):
        options = {"attention_mask": mask, "is_causal": False, "use_cache": False}
        expected, got = logits(theirs, input_ids, **options), logits(ours, input_ids, **options)
        is_token = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(got[is_token], expected[is_token], **CLOSE)
        assert not torch.allclose(got, logits(ours, input_ids, attention_mask=mask), atol=1e-2)


ENCODERS = {
    "Bert": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "ModernBert": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "local_attention": WINDOW,
        "pad_token_id": 0,
    },
    "Bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
}


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_bidirectional_and_cross_attention(name: str, side: str | None) -> None:
    torch.manual_seed(0)
    spread = {"init_std": 0.3} if name == "Bart" else {"initializer_range": 0.3}
    config = getattr(transformers, name + "Config")(vocab_size=96, **spread, **ENCODERS[name])
    theirs = getattr(transformers, name + "Model")(config).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("longctx")
    attention_mask = None if side is None else padding([LENGTH, 31], side)
    is_token = slice(None) if attention_mask is None else attention_mask.bool()
    with torch.no_grad():
        expected, got = (m(tokens(2, LENGTH), attention_mask=attention_mask)[0] for m in (theirs, ours))
    torch.testing.assert_close(got[is_token], expected[is_token], atol=1e-4, rtol=1e-4)
