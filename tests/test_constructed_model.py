"""The constructed model retrieves: its codes, its answers, and what its other heads do to them."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from longctx.demo.text import Haystack, Needle, tokenizer
from longctx.models.constructed import (
    ANSWER,
    BOS,
    CODE,
    MAX_VOCAB,
    NO_MATCH,
    SCRATCH,
    SECOND,
    heads_of_layer,
    retrieval_model,
    word_codes,
)

LENGTH = 2048


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack.read(None, LENGTH)


def ask(model, words, prompt: list[str], count: int) -> list[str]:
    ids = torch.tensor([words.convert_tokens_to_ids(prompt)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return words.convert_ids_to_tokens(out[0, len(prompt) :])


def test_codes_of_two_words_differ_in_24_to_40_signs():
    # The code is linear: the distances from word 0's signs, all positive, are all distances there are.
    codes = word_codes(MAX_VOCAB)
    signs = codes[1:, :CODE]
    assert signs.abs().eq(1).all()
    assert signs.sum(1).abs().max() <= CODE - 48
    assert codes.norm(dim=1).unique().tolist() == [CODE**0.5]
    assert (codes[1:] @ codes[BOS]).eq(0).all()
    sample = signs[torch.randperm(len(signs), generator=torch.Generator().manual_seed(0))[:2000]]
    products = sample @ sample.T
    assert products.fill_diagonal_(0).abs().max() <= CODE - 48


def test_bounds_of_a_match_hold_for_every_pair_of_words():
    flips = torch.tensor([1.0, -1.0, -1.0]).repeat(22)[:CODE]
    # The product of two codes is a code (or all ones), so that one word at a time covers all pairs.
    cross = max((word_codes(MAX_VOCAB)[1:, :CODE] @ flips).abs().max().item(), flips.sum().abs().item())
    worst_match = CODE + SECOND**2 * CODE - 2 * SECOND * cross
    best_other = 16 + SECOND**2 * CODE + 2 * SECOND * cross
    assert best_other < NO_MATCH < worst_match


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dtype"),
    [(2, 2, torch.float32), (8, 2, torch.float32), (8, 8, torch.float32), (6, 3, torch.bfloat16)],
)
def test_finds_the_needle_at_every_depth(haystack, num_heads, num_kv_heads, dtype):
    needles = [Needle.random(random.Random(seed), set(haystack.words)) for seed in range(4)]
    words = tokenizer(haystack.words, *(needle.words for needle in needles))
    model = retrieval_model(len(words), num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype)
    for needle, depth in zip(needles, (0.0, 0.4, 0.9, 1.0), strict=True):
        prompt = haystack.prompt(needle, length=LENGTH, depth=depth)
        assert ask(model, words, prompt, 4) == list(needle.values)


def test_says_nothing_about_an_absent_key(haystack):
    needle, absent = Needle("color", ("7", "8", "9")), Needle("zozozozo", ("1",))
    words = tokenizer(haystack.words, needle.words, absent.words)
    model = retrieval_model(len(words), num_heads=4)
    prompt = haystack.prompt(needle, length=LENGTH, depth=0.5, question=absent.question)
    assert ask(model, words, prompt, 3) == ["<s>"]


def test_two_words_of_context_tell_repeated_values_apart(haystack):
    needle = Needle("kokokoko", ("the", "7", "of", "8", "the", "3"))
    words = tokenizer(haystack.words, needle.words)
    model = retrieval_model(len(words), num_heads=4)
    prompt = haystack.prompt(needle, length=LENGTH, depth=0.3)
    assert ask(model, words, prompt, 6) == list(needle.values)


def test_other_heads_reach_the_logits_but_not_the_answer(haystack):
    needle = Needle.random(random.Random(1), set(haystack.words))
    words = tokenizer(haystack.words, needle.words)
    model = retrieval_model(len(words), num_heads=8, num_kv_heads=2)
    ids = torch.tensor([words.convert_tokens_to_ids(haystack.prompt(needle, length=LENGTH, depth=0.6))])
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=1).logits[0, -1]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[SCRATCH] = 0
        quiet = model(ids, logits_to_keep=1).logits[0, -1]
    assert logits.argmax() == quiet.argmax() == words.convert_tokens_to_ids(needle.values[0])
    assert 0.1 < (logits - quiet).std() < 1.0
    top = logits.topk(2).values
    assert top[0] - top[1] > 5


def test_every_kind_of_head_is_there_and_kv_heads_differ():
    kinds = {head.kind for layer in (0, 1) for head in heads_of_layer(layer, 8)}
    assert kinds == {"previous", "before", "induction", "clustered", "local", "sink"}
    attention = retrieval_model(16, num_heads=8, num_kv_heads=2).model.layers[0].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        first, second = projection.weight.chunk(2)
        assert not torch.equal(first, second)
        assert torch.equal(first.abs(), second.abs())


def test_a_saved_model_answers_as_before(tmp_path):
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([[0, 3, 7, 5, 9, 1, 2, 3, 7]])
    retrieval_model(16, num_heads=2).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
    assert out[0, 9:].tolist() == [5, 9]
    assert model.lm_head.weight[:, ANSWER].any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 3)])
def test_refuses_heads_that_cannot_work(heads, kv_heads):
    with pytest.raises(ValueError, match="num_heads"):
        retrieval_model(16, num_heads=heads, num_kv_heads=kv_heads)


def test_refuses_more_words_than_codes():
    with pytest.raises(ValueError, match="32768"):
        word_codes(MAX_VOCAB + 1)
