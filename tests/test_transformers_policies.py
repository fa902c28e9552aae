"""Models under every policy, against dense attention masked to the pattern that the policy selected."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from longctx.integrations.transformers import apply, attention, stats, using
from longctx.prefill import AShape, BlockTopK, Dense, LMInfinite, PerLayer
from longctx.reference.attention import masked_attention
from transformers_models import NAMES, padding, tiny, tokens

LENGTH = 300
CLOSE = {"atol": 5e-5, "rtol": 5e-5}
POLICIES = (
    "flexprefill:gamma=0.6,block_size=32,min_budget=32",
    "ashape:num_sink_tokens=8,window_size=40",
    "blocktopk:top_k=1,block_size=32,num_first_blocks=0",
    "xattention:threshold=0.6,stride=8,block_size=32",
    "random:density=0.3,block_size=32",
    "oracle:density=0.3,block_size=32",
)


def name_of(policy: str) -> str:
    return policy.partition(":")[0]


@contextmanager
def masked_dense() -> Iterator[None]:
    """Sparse layers compute every score and keep the pattern's, in float64."""

    def masked(
        state: attention.LayerState,
        counted: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        layer_idx: int | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        pattern = state.policy.select(q, k, attention._context(options, layer_idx))
        scores = {name: options[name] for name in ("softmax_scale", "softcap", "sinks")}
        state.counts.add_sparse("masked", torch.ones(()))
        return masked_attention(q, k, v, pattern.to_mask(), **scores)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_sparse", masked)
        yield


def logits(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids, **options).logits


def assert_sparse(model: PreTrainedModel, calls: int = 1) -> None:
    table = stats(model)
    assert [layer.sparse_calls for layer in table.layers] == [calls] * len(table.layers)
    assert 0.0 < float(table.density) <= 1.0


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("side", [None, "left", "right", "gap"])
def test_batch(policy: str, side: str | None) -> None:
    input_ids = tokens(2, LENGTH)
    attention_mask = None if side is None else padding([LENGTH, 211], "right" if side == "gap" else side)
    if side == "gap":
        attention_mask[:, 250:] = 1
    is_token = slice(None) if attention_mask is None else attention_mask.bool()
    model = apply(tiny("llama"), policy, min_seqlen_q=64)
    got = logits(model, input_ids, attention_mask=attention_mask)
    assert_sparse(model)
    dense = logits(apply(model, "dense"), input_ids, attention_mask=attention_mask)
    apply(model, policy, min_seqlen_q=64)
    with masked_dense():
        expected = logits(model, input_ids, attention_mask=attention_mask)
    torch.testing.assert_close(got[is_token], expected[is_token], **CLOSE)
    assert not torch.allclose(got[is_token], dense[is_token], atol=1e-3)  # the policy left something out


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill(policy: str, cache: str) -> None:
    """The second chunk attends to the first by the policy too; with a static cache K is longer than the prompt."""
    input_ids = tokens(2, LENGTH)
    attention_mask = padding([LENGTH, 250], "left")
    is_token = attention_mask.bool()

    def run(model: PreTrainedModel) -> Tensor:
        config = model.config
        past = StaticCache(config=config, max_cache_len=350) if cache == "static" else DynamicCache(config=config)
        first = logits(model, input_ids[:, :150], attention_mask=attention_mask[:, :150], past_key_values=past)
        second = logits(model, input_ids[:, 150:], attention_mask=attention_mask, past_key_values=past)
        return torch.cat([first, second], dim=1)

    model = apply(tiny("llama"), policy, min_seqlen_q=64)
    got = run(model)
    assert_sparse(model, calls=2)
    with masked_dense():
        expected = run(model)
    torch.testing.assert_close(got[is_token], expected[is_token], **CLOSE)


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2]], ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_models(name: str, policy: str) -> None:
    """GQA, windows, softcap and sinks under a policy."""
    input_ids = tokens(2, LENGTH)
    attention_mask = padding([LENGTH, 211], "left")
    options = {"sliding_window": 130} if name in ("mistral", "phi3", "gemma2", "gpt_oss", "qwen2") else {}
    model = apply(tiny(name, **options), policy, min_seqlen_q=64)
    got = logits(model, input_ids, attention_mask=attention_mask)
    assert_sparse(model)
    with masked_dense():
        expected = logits(model, input_ids, attention_mask=attention_mask)
    is_token = attention_mask.bool()
    torch.testing.assert_close(got[is_token], expected[is_token], **CLOSE)


# RandomBlocks draws over the key axis, buffer included.
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if name_of(policy) != "random"], ids=name_of)
def test_static_cache_selects_as_a_dynamic_one(policy: str) -> None:
    """The unused tail of a static cache changes neither the selection nor the tokens."""
    model = apply(tiny("llama"), policy, min_seqlen_q=64)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    dynamic = model.generate(tokens(2, LENGTH), **options)
    static = model.generate(tokens(2, LENGTH), cache_implementation="static", **options)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **CLOSE)
    assert [layer.sparse_calls for layer in stats(model).layers] == [2, 2]
    assert [layer.dense_reasons for layer in stats(model).layers] == [{"seqlen_q < 64": 6}] * 2


def test_packed_documents_under_a_policy() -> None:
    lengths = (200, 100)
    input_ids = tokens(1, LENGTH)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    model = apply(tiny("llama"), AShape(num_sink_tokens=8, window_size=40), min_seqlen_q=64)
    got = logits(model, input_ids, position_ids=position_ids, use_cache=False)
    alone = [logits(model, document, use_cache=False) for document in input_ids.split(lengths, dim=1)]
    torch.testing.assert_close(got, torch.cat(alone, dim=1), **CLOSE)


def test_left_padding_keeps_the_sinks() -> None:
    """A padded prompt gives what it gives alone: the sinks are its own first tokens."""
    model = apply(tiny("llama"), AShape(num_sink_tokens=8, window_size=40), min_seqlen_q=64)
    input_ids = tokens(1, 200)
    padded = torch.nn.functional.pad(input_ids, (100, 0))
    attention_mask = padding([LENGTH, 200], "left")[1:]
    options = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}
    torch.testing.assert_close(logits(model, padded, **options)[:, 100:], logits(model, input_ids), **CLOSE)


def test_per_layer() -> None:
    policy = PerLayer({0: Dense()}, default=BlockTopK(top_k=2, block_size=32))
    model = apply(tiny("llama"), policy, min_seqlen_q=64)
    logits(model, tokens(1, LENGTH))
    first, second = stats(model).layers
    assert (first.policy, first.sparse_calls, first.dense_reasons) == ("dense", 0, {"policy": 1})
    assert (second.policy, second.sparse_calls, second.dense_reasons) == ("blocktopk", 1, {})
    assert first.density is None
    assert 0.0 < float(second.density) < 1.0


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("how", ["plain", "left padded", "second chunk", "static"])
def test_lm_infinite(name: str, how: str) -> None:
    """Distances beyond the window are computed as the window, from the layer's own q and k before RoPE."""
    num_global, window = 4, 24
    length = 90
    options = {"sliding_window": None} if name == "phi3" else {}
    if name == "gpt_oss":
        options = {"layer_types": ["full_attention"]}
    model = tiny(name, num_hidden_layers=1, **options)
    policy = LMInfinite(num_global_tokens=num_global, window_size=window)
    ours = apply(copy.deepcopy(model), policy, min_seqlen_q=16)
    input_ids = tokens(2, length)
    lengths = [length, 70] if how == "left padded" else [length, length]
    attention_mask = padding(lengths, "left")
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)

    layer = (ours.model.layers[0]).self_attn
    seen: list[Tensor] = []
    outputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        if how in ("second chunk", "static"):
            config = ours.config
            past = StaticCache(config=config, max_cache_len=120) if how == "static" else DynamicCache(config=config)
            for begin, end in ((0, 40), (40, length)):
                part = {"attention_mask": attention_mask[:, :end], "position_ids": position_ids[:, begin:end]}
                ours(input_ids[:, begin:end], past_key_values=past, **part)
        else:
            ours(input_ids, attention_mask=attention_mask, position_ids=position_ids)
    expected = _lm_infinite(layer, ours.model.rotary_emb, torch.cat(seen, dim=1), lengths, num_global, window)
    is_token = attention_mask.bool()
    torch.testing.assert_close(torch.cat(outputs, dim=1)[is_token], expected[is_token], **CLOSE)
    assert stats(ours).layers[0].sparse_calls == len(seen)


def _lm_infinite(
    layer: torch.nn.Module,
    rotary_emb: torch.nn.Module,
    hidden: Tensor,
    lengths: list[int],
    num_global: int,
    window: int,
) -> Tensor:
    """One query and one key at a time: each pair is rotated to the distance the method gives it."""
    batch, total, _ = hidden.shape
    dim = layer.head_dim
    with torch.no_grad():
        if hasattr(layer, "qkv_proj"):
            q, k, v = layer.qkv_proj(hidden).split([4 * dim, 2 * dim, 2 * dim], dim=-1)
        else:
            q, k, v = layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)
        distance = torch.arange(total)[None]
        cos, sin = (table[0].double() for table in rotary_emb(torch.zeros(1), distance))
    if cos.shape[-1] * 2 == dim and type(layer).__name__ == "GptOssAttention":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    q, k, v = (x.double().view(batch, total, -1, dim).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    rotary = cos.shape[-1]
    scale = cos[0, 0]  # YaRN scales both q and k; a rotation by a distance carries it once

    def rotate(x: Tensor, by: int) -> Tensor:
        first, second = x[..., :rotary].chunk(2, -1)
        turned = x[..., :rotary] * cos[by] + torch.cat([-second, first], -1) * sin[by]
        return torch.cat([turned * scale, x[..., rotary:]], -1)

    out = torch.zeros(batch, 4, total, dim, dtype=torch.float64)
    for b in range(batch):
        begin = total - lengths[b]
        for i in range(begin, total):
            keys = [j for j in range(begin, i + 1) if i - j < window or j - begin < num_global]
            scores = [(rotate(q[b, :, i], min(i - j, window)) * k[b, :, j]).sum(-1) for j in keys]
            score = torch.stack(scores, -1) * layer.scaling
            if hasattr(layer, "sinks"):
                score = torch.cat([score, layer.sinks.detach().double()[:, None]], -1)
            weight = torch.softmax(score, -1)[:, : len(keys)]
            out[b, :, i] = (weight[..., None] * v[b][:, keys]).sum(1)
    return out.transpose(1, 2).flatten(2).float()


def test_rope_that_is_not_covered_raises() -> None:
    policy = LMInfinite(num_global_tokens=4, window_size=24)
    with pytest.raises(NotImplementedError, match=r"supports rope types .*; got 'dynamic'"):
        apply(tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), policy)
    with pytest.raises(NotImplementedError, match="got model type 'granite'"):
        apply(tiny("granite"), policy)


def test_gap_of_padding_with_rope_raises() -> None:
    model = apply(tiny("llama"), LMInfinite(num_global_tokens=4, window_size=24), min_seqlen_q=16)
    attention_mask = torch.ones(1, 60, dtype=torch.int64)
    attention_mask[0, 10:15] = 0
    past = DynamicCache()
    logits(model, tokens(1, 8), past_key_values=past)
    with pytest.raises(NotImplementedError, match="cannot tell the positions of cached keys"):
        logits(model, tokens(1, 52), past_key_values=past, attention_mask=attention_mask)


def test_checkpointed_layers_recompute_under_the_policy_of_their_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of a `using` block still holds in backward, and its calls count once."""

    def differentiable(state: attention.LayerState, counted: bool, q: Tensor, k: Tensor, v: Tensor, options: Any, *_):
        if counted:
            state.counts.add_sparse(state.policy.name, torch.ones(()))
        mask = state.policy.select(q, k, attention._context(options, None)).to_mask()
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    monkeypatch.setattr(attention, "_sparse", differentiable)
    # `using` over another sparse policy, which a recomputation must not fall back to.
    model = apply(tiny("llama"), AShape(num_sink_tokens=0, window_size=1), min_seqlen_q=16).train()
    input_ids = tokens(1, 60)

    def gradient() -> Tensor:
        model.zero_grad()
        with using(model, AShape(num_sink_tokens=2, window_size=10), min_seqlen_q=16):
            loss = model(input_ids, labels=input_ids).loss
            table = stats(model)
        loss.backward()
        assert [layer.calls for layer in table.layers] == [1, 1]
        assert [layer.calls for layer in stats(model).layers] == [0, 0]
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.testing.assert_close(gradient(), expected)
