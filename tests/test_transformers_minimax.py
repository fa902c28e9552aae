"""MiniMax's lightning layers on longctx.linear_attention, beside transformers' own loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import assert_same_bits
from test_linear_attention import TOLERANCE, relative_error

transformers = pytest.importorskip("transformers", reason="transformers is missing")
from transformers.models.minimax import modeling_minimax as stock  # noqa: E402

import longctx  # noqa: E402
from longctx.integrations.transformers import remove, stats, using  # noqa: E402
from longctx.integrations.transformers.minimax import MAX_DECODE_TOKENS, LightningAttention, switch  # noqa: E402
from transformers_models import VOCAB, padding, tokens  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HIDDEN = 48
LINEAR_FIRST = ["linear_attention", "full_attention"] * 2
LINEAR_LATER = ["full_attention", "linear_attention"] * 2


def config(layer_types: list[str], **options: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_attention_heads": 6,  # no power of two
        "num_key_value_heads": 2,
        "head_dim": 16,
        "block_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return transformers.MiniMaxConfig(**{**sizes, **options})


def tiny(layer_types: list[str] = LINEAR_FIRST, **options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.MiniMaxForCausalLM(config(layer_types, **options)).eval()


def layer_of(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    layer = stock.MiniMaxLightningAttention(config(["linear_attention"] * 6), layer_idx=2)
    nn.init.normal_(layer.norm.weight)
    return layer.to(dtype).requires_grad_(False)


def ours(layer: Any) -> Any:
    layer = copy.deepcopy(layer)
    switch(layer, on=True)
    assert type(layer) is LightningAttention
    return layer


def inputs(seqlen: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, seqlen, HIDDEN, generator=torch.Generator().manual_seed(seqlen)).to(dtype)


def run(layer: Any, x: Tensor, pieces: list[int], mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the cached state after every piece."""
    cache, outs, states, begin = stock.MiniMaxCache(), [], [], 0
    for length in pieces:
        here = slice(begin, begin + length)
        out, state = layer(x[:, here], None, None if mask is None else mask[:, here], cache)
        assert cache.get_linear_cache(2) is state
        outs.append(out)
        states.append(state)
        begin += length
    return torch.cat(outs, dim=1), states


# ---- one layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "pieces",
    [[1], [31], [32], [150], [100, 1, 1], [100, 3, MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1], [1, 1, 64]],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_is_that_of_transformers(dtype: torch.dtype, pieces: list[int], padded: bool) -> None:
    """Also where padding stands inside a sequence, which ages the state like a token."""
    layer, x = layer_of(dtype), inputs(sum(pieces), dtype)
    mask = None
    if padded:
        mask = torch.ones(2, sum(pieces), dtype=torch.bool)
        mask[0, : sum(pieces) // 3] = mask[1, sum(pieces) // 2] = False
    out, states = run(ours(layer), x, pieces, mask)
    expected, expected_states = run(layer, x, pieces, mask)
    exact, exact_states = run(layer_of(torch.float64), x.double(), pieces, mask)
    assert out.dtype == dtype
    added = max(TOLERANCE[dtype], 1e-6)  # their powers of the decay are float32, in float64 too
    assert relative_error(out, exact) <= relative_error(expected, exact) + added
    for state, theirs, right in zip(states, expected_states, exact_states, strict=True):
        assert state.dtype == theirs.dtype
        assert state.shape == theirs.shape
        assert relative_error(state, right) <= relative_error(theirs, right) + added


def test_16_bit_decoding_does_not_round_the_state() -> None:
    """What transformers keeps in bfloat16 stops taking in small terms; the float32 state behind it does not."""
    x = inputs(400, torch.bfloat16) * 3
    layer, pieces = layer_of(torch.bfloat16), [1] * 400
    _, exact = run(layer_of(torch.float64), x.double(), [400])
    _, theirs = run(layer, x, pieces)
    _, states = run(ours(layer), x, pieces)
    assert relative_error(states[-1], exact[-1]) < 4e-3 < 2e-2 < relative_error(theirs[-1], exact[-1])


def test_slopes_of_another_model_count_also_in_16_bits() -> None:
    layer = layer_of(torch.bfloat16)
    layer.slope_rate.mul_(3)
    wide, x = layer_of(torch.float64), inputs(40, torch.bfloat16)
    wide.slope_rate.copy_(layer.slope_rate)
    wide.query_decay, wide.key_decay, wide.diagonal_decay = wide.decay_factors(wide.slope_rate)
    out, _ = ours(layer)(x, None, None)
    expected, _ = wide(x.double(), None, None)
    assert relative_error(out, expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ours_first", [False, True])
def test_switching_on_a_cache(dtype: torch.dtype, ours_first: bool) -> None:
    """Prompt by one, next tokens by the other, then back."""
    first, second = layer_of(dtype), ours(layer_of(dtype))
    if ours_first:
        first, second = second, first
    x, cache, outs = inputs(110, dtype), stock.MiniMaxCache(), []
    for layer, here in ((first, slice(0, 100)), (second, slice(100, 105)), (first, slice(105, 110))):
        outs.append(layer(x[:, here], None, None, cache)[0])
    expected, _ = run(layer_of(torch.float64), x.double(), [100, 10])
    assert relative_error(torch.cat(outs, dim=1), expected) < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_earlier_states_stay_as_they_are(dtype: torch.dtype) -> None:
    """Caches are branched off by copying the list of their states."""
    layer, x, cache = ours(layer_of(dtype)), inputs(60, dtype), stock.MiniMaxCache()
    layer(x[:, :50], None, None, cache)
    state = cache.get_linear_cache(2)
    before = state.clone()
    outs = []
    for _ in range(2):
        branch = copy.copy(cache)
        branch.linear_cache = list(cache.linear_cache)
        outs.append(layer(x[:, 50:51], None, None, branch)[0])
    assert_same_bits(state, before)
    assert_same_bits(outs[0], outs[1])


def test_autocast() -> None:
    layer, x = layer_of(torch.float32), inputs(70, torch.float32)
    exact, _ = layer(x, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, states = run(layer, x, [69, 1])
        out, our_states = run(ours(layer), x, [69, 1])
    assert out.dtype == expected.dtype
    assert our_states[0].dtype == states[0].dtype
    assert relative_error(out, exact) <= relative_error(expected, exact) + TOLERANCE[torch.bfloat16]


# ---- a model


def close(actual: Tensor, expected: Tensor) -> None:
    assert relative_error(actual, expected) < 1e-5


def kinds(model: Any) -> list[type]:
    return [type(layer.self_attn) for layer in model.model.layers]


@torch.no_grad()
def test_one_call_there_and_back() -> None:
    model, ids = tiny(), tokens(2, 100)
    before, expected = kinds(model), model(ids).logits
    keys = list(model.state_dict())
    for _ in range(2):  # a second call changes nothing
        longctx.apply(model, "dense")
        assert kinds(model) == [LightningAttention, stock.MiniMaxAttention] * 2
        close(model(ids).logits, expected)
    assert list(model.state_dict()) == keys
    assert len(stats(model).layers) == 2  # those that a policy concerns
    copied = copy.deepcopy(model)
    for some in (model, copied):
        remove(some)
        assert kinds(some) == before
        assert_same_bits(some(ids).logits, expected)
    with using(model, "dense"):
        assert kinds(model) == [LightningAttention, stock.MiniMaxAttention] * 2
        close(model(ids).logits, expected)
    assert kinds(model) == before
    longctx.apply(model, "dense")
    with using(model, "ashape"):
        pass
    assert kinds(model) == [LightningAttention, stock.MiniMaxAttention] * 2


@pytest.mark.parametrize("layer_types", [LINEAR_FIRST, LINEAR_LATER, ["linear_attention"] * 3])
@torch.no_grad()
def test_generate_says_the_same(layer_types: list[str]) -> None:
    """As transformers without a cache: where the first layer is linear, its cache counts no tokens, and its masks are
    wrong in padded batches."""
    model, ids = tiny(layer_types), tokens(3, 50)
    mask = padding([50, 20, 41], "left")
    ids[mask == 0] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected, logits = model.generate(ids, use_cache=False, **options), model(ids, attention_mask=mask).logits
    longctx.apply(model, "dense")
    close(model(ids, attention_mask=mask).logits[mask == 1], logits[mask == 1])
    assert model.generate(ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("ours_first", [False, True])
@torch.no_grad()
def test_switching_in_the_middle_of_a_text(ours_first: bool) -> None:
    model, ids = tiny(LINEAR_LATER), tokens(2, 70)
    expected = model(ids).logits
    name = "cache" if hasattr(model(ids), "cache") else "past_key_values"
    cache, logits = stock.MiniMaxCache(), []
    for here, on in ((slice(0, 60), ours_first), (slice(60, 61), not ours_first), (slice(61, 70), ours_first)):
        (longctx.apply if on else lambda model, _: remove(model))(model, "dense")
        logits.append(model(ids[:, here], use_cache=True, **{name: cache}).logits)
    close(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_a_model_without_such_layers_is_left_alone() -> None:
    from transformers_models import tiny as tiny_llama

    model = tiny_llama("llama")
    before = [type(module) for module in model.modules()]
    longctx.apply(model, "dense")
    assert [type(module) for module in model.modules()] == before
