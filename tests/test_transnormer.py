"""TransNormerLM: every way through it gives the numbers of one, and transformers can do with it what it does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import assert_same_bits
from longctx.linear import transnormer_code_log_decay
from test_linear_attention import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is missing")
from longctx.cache.cache import CACHE_NAME  # noqa: E402
from longctx.models import LightningCache, TransNormerConfig, TransNormerLM, TransNormerModel  # noqa: E402
from longctx.models.transnormer import MAX_DECODE_TOKENS  # noqa: E402
from test_linear_block import block_formula  # noqa: E402

VOCAB = 96
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2, "head_dim": 24, "use_bias": True},
    "tied, no positions": {"tie_word_embeddings": True, "use_lrpe": False, "scale_embeddings": False},
}


def tiny(**options: Any) -> TransNormerLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.2,  # large enough for logits that differ
        "pad_token_id": 0,
    }
    return TransNormerLM(TransNormerConfig(**{**sizes, **options})).eval()


def tokens(batch: int, seqlen: int) -> Tensor:
    return torch.randint(1, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def cache_of(outputs: Any) -> LightningCache:
    cache = getattr(outputs, CACHE_NAME)
    assert isinstance(cache, LightningCache)
    return cache


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < tolerance


# ---- the numbers


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_by_hand(shape: str) -> None:
    model, ids = tiny(**SHAPES[shape]).double(), tokens(2, 70)
    x = model.model.embed_tokens(ids) * (8.0 if model.config.scale_embeddings else 1.0)
    for block in model.model.layers:
        x = block_formula(block, x)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    close(model(ids).logits, x @ model.lm_head.weight.T, 1e-12)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    positions = [block.attention.lrpe is not None for block in model.model.layers]
    assert positions == [model.config.use_lrpe, False, False]


def test_decays_are_those_of_the_released_code() -> None:
    for layer_idx, block in enumerate(tiny().model.layers):
        assert_same_bits(block.attention.log_decay, transnormer_code_log_decay(4, layer_idx, 3))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_prefill_in_one_in_chunks_and_by_token(shape: str) -> None:
    model, ids = tiny(**SHAPES[shape]), tokens(2, 150)
    expected = model(ids, use_cache=False)
    assert getattr(expected, CACHE_NAME, None) is None
    few = MAX_DECODE_TOKENS
    for pieces in ([150], [64, 64, 22], [70, 1, 0, few, few + 1, 78 - 2 * few], [1] * 150):
        cache, logits = LightningCache(), []
        for piece in ids.split(pieces, dim=1):
            outputs = model(piece, **{CACHE_NAME: cache})
            assert cache_of(outputs) is cache
            logits.append(outputs.logits)
        close(torch.cat(logits, dim=1), expected.logits)
        assert cache.get_seq_length() == 150


@torch.no_grad()
def test_the_cache_does_not_grow() -> None:
    model, cache = tiny(), LightningCache()
    sizes = set()
    for length in (1, 100, 3, 1000, 1):
        model(tokens(2, length), past_key_values=cache)
        sizes.add(sum(state.kv.untyped_storage().nbytes() for state in cache.states))
    assert sizes == {2 * 4 * 16 * 4 * (2 * 16 + 16 + 16)}  # LRPE doubles the keys of the first layer
    assert cache.get_seq_length() == 1105
    assert len(cache) == 3
    assert cache.states[0].num_tokens.tolist() == [1105, 1105]


@torch.no_grad()
def test_no_token_sees_the_future_or_another_sequence() -> None:
    model, ids = tiny(), tokens(2, 100)
    changed = ids.clone()
    changed[:, 70:] = 1
    changed[1] = 2
    logits, again = model(ids).logits, model(changed).logits
    assert_same_bits(again[0, :70], logits[0, :70])
    assert (again[0, 70:] != logits[0, 70:]).any(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches(side: str) -> None:
    model, lengths = tiny(), (40, 9, 25)
    rows = [tokens(1, length)[0] for length in lengths]
    ids, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    for i, row in enumerate(rows):
        here = slice(40 - len(row), 40) if side == "left" else slice(0, len(row))
        ids[i, here], mask[i, here] = row, 1
    outputs, more = model(ids, attention_mask=mask), tokens(3, 4)
    next_mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], dim=1)
    after = model(more, attention_mask=next_mask, past_key_values=cache_of(outputs))
    for i, row in enumerate(rows):
        close(outputs.logits[i, mask[i].bool()], model(row[None]).logits[0])
        close(after.logits[i], model(torch.cat([row, more[i]])[None]).logits[0, len(row) :])


@torch.no_grad()
def test_hidden_states_embeddings_and_tuples() -> None:
    model, ids = tiny(), tokens(2, 30)
    outputs = model(ids, output_hidden_states=True, logits_to_keep=2)
    assert len(outputs.hidden_states) == 4
    close(outputs.logits, model.lm_head(outputs.hidden_states[-1])[:, -2:])
    close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    assert_same_bits(model(ids, return_dict=False)[0], model(ids).logits)
    assert_same_bits(model.model(ids)[0], outputs.hidden_states[-1])
    assert isinstance(model.model, TransNormerModel)


def test_loss_is_that_of_the_next_token() -> None:
    model, ids = tiny(), tokens(2, 30)
    labels = ids.clone()
    labels[0, :10] = -100
    logits = model(ids).logits[:, :-1].double()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    kept = labels[:, 1:] != -100
    torch.testing.assert_close(model(ids, labels=labels).loss.double(), -log_probs[kept].mean())


# ---- generate


def greedy(model: TransNormerLM, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 13}], ids=str)
@torch.no_grad()
def test_generate_is_the_argmax_loop(options: dict[str, Any]) -> None:
    model, ids = tiny(), tokens(2, 33)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
    assert out.tolist() == greedy(model, ids, 12).tolist()


@torch.no_grad()
def test_generate_from_padded_prompts() -> None:
    model, ids = tiny(), tokens(2, 33)
    ids[1, :20] = 0
    mask = (ids != 0).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, first in enumerate((0, 20)):
        assert out[row, first:].tolist() == greedy(model, ids[row : row + 1, first:], 12)[0].tolist()


@torch.no_grad()
def test_beams_are_those_without_a_cache() -> None:
    """Beams swap their states when they swap their tokens."""
    model, ids = tiny(), tokens(3, 20)
    options = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3, "do_sample": False}
    assert model.generate(ids, **options).tolist() == model.generate(ids, use_cache=False, **options).tolist()


@torch.no_grad()
def test_sampling_is_that_without_a_cache() -> None:
    model, ids = tiny(), tokens(2, 20)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(ids, max_new_tokens=10, do_sample=True, top_k=20, use_cache=use_cache).tolist())
    assert texts[0] == texts[1]
    assert texts[0] != greedy(model, ids, 10).tolist()


@torch.no_grad()
def test_a_second_turn_continues_the_cache() -> None:
    model, ids = tiny(), tokens(2, 20)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = cache_of(first)
    assert cache.get_seq_length() == 24  # the last token was not fed
    prompt = torch.cat([first.sequences, tokens(2, 7)], dim=1)
    branch, copied = cache.branch(), copy.deepcopy(cache)
    out = model.generate(prompt, **{CACHE_NAME: cache}, max_new_tokens=6, do_sample=False)
    assert out.tolist() == greedy(model, prompt, 6).tolist()
    for other in (branch, copied):
        assert other.get_seq_length() == 24
        again = model.generate(prompt, **{CACHE_NAME: other}, max_new_tokens=6, do_sample=False)
        assert again.tolist() == out.tolist()


@torch.no_grad()
def test_the_rows_of_a_cache() -> None:
    model, ids = tiny(), tokens(3, 20)
    rows = torch.tensor([2, 0, 0])
    changes = {
        "reorder_cache": (rows, rows),
        "batch_select_indices": (rows[:2], rows[:2]),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    for method, (argument, expected) in changes.items():
        cache = cache_of(model(ids))
        getattr(cache, method)(argument)
        close(
            model(tokens(len(expected), 1), past_key_values=cache).logits,
            model(torch.cat([ids[expected], tokens(len(expected), 1)], dim=1)).logits[:, -1:],
        )
    cache.reset()
    assert (cache.get_seq_length(), len(cache)) == (0, 0)
    close(model(ids, past_key_values=cache).logits, model(ids).logits)


# ---- saved and loaded


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_save_and_load(tmp_path: Any, shape: str) -> None:
    model, ids = tiny(**SHAPES[shape]), tokens(2, 30)
    for block in model.model.layers:
        block.attention.log_decay.mul_(0.9)
    model.save_pretrained(tmp_path)
    for loaded in (
        TransNormerLM.from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is TransNormerLM
        assert_same_bits(loaded(ids).logits, model(ids).logits)
        assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same_bits(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_16_bits_keep_decays_and_angles(tmp_path: Any, dtype: torch.dtype) -> None:
    model, ids = tiny(), tokens(2, 100)
    expected, before = model(ids).logits, copy.deepcopy(model)
    model.save_pretrained(tmp_path / "wide")
    model.to(dtype).save_pretrained(tmp_path / "narrow")
    for narrow in (
        model,
        *(TransNormerLM.from_pretrained(tmp_path / name, dtype=dtype) for name in ("wide", "narrow")),
    ):
        assert narrow.lm_head.weight.dtype == dtype
        for block, wide in zip(narrow.model.layers, before.model.layers, strict=True):
            assert_same_bits(block.attention.log_decay, wide.attention.log_decay)
        assert_same_bits(narrow.model.layers[0].attention.lrpe.theta, before.model.layers[0].attention.lrpe.theta)
        assert narrow(ids).logits.dtype == dtype
        close(narrow(ids).logits, expected, 5e-2)


@torch.no_grad()
def test_what_a_checkpoint_lacks_is_initialised(tmp_path: Any) -> None:
    model = tiny()
    state = {name: value for name, value in model.state_dict().items() if "theta" not in name and "decay" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = TransNormerLM.from_pretrained(tmp_path)
    assert_same_bits(loaded(tokens(2, 30)).logits, model(tokens(2, 30)).logits)


# ---- what is refused


def test_refusals() -> None:
    model, ids = tiny(), tokens(2, 10)
    cache = cache_of(model(ids))
    with pytest.raises(NotImplementedError, match="does not take `position_ids`"):
        model(ids, position_ids=torch.arange(10)[None])
    with pytest.raises(NotImplementedError, match="does not take `output_attentions`"):
        model(ids, output_attentions=True)
    for mask in (torch.ones(2, 9), torch.ones(1, 10), torch.ones(2, 1, 10, 10)):
        with pytest.raises(ValueError, match="`attention_mask` must have shape"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="is a LightningCache; got DynamicCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stateful models"):
        model.generate(ids[:1], max_new_tokens=5, prompt_lookup_num_tokens=2)
    with pytest.raises(NotImplementedError, match="`cache_implementation` must be None; got 'static'"):
        model.generate(ids, max_new_tokens=5, cache_implementation="static")
    with pytest.raises(ValueError, match=r"`state.kv` must have shape"):
        model(tokens(3, 10), past_key_values=cache)
