"""What the adapter cannot honour raises, and names the alternative."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from longctx.integrations.transformers import apply, remove, stats, using
from longctx.integrations.transformers.attention import attention_forward
from transformers_models import tiny, tokens

INPUT = tokens(1, 20)


@pytest.fixture
def model() -> PreTrainedModel:
    return apply(tiny("llama"), "dense")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_prepared_masks(model: PreTrainedModel, dtype: torch.dtype) -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=dtype)
    with pytest.raises(NotImplementedError, match=r"prepared masks are not supported.*\[1, 1, 20, 20\]"):
        model(INPUT, attention_mask=mask)


def test_masks_with_two_gaps(model: PreTrainedModel) -> None:
    mask = torch.ones_like(INPUT)
    mask[0, [4, 9]] = 0
    with pytest.raises(NotImplementedError, match="more than one gap of padding"):
        model(INPUT, attention_mask=mask)


def test_output_attentions(model: PreTrainedModel) -> None:
    with pytest.raises(NotImplementedError, match="`output_attentions=True` is not supported"):
        model(INPUT, output_attentions=True)
    eager = tiny("llama", attn_implementation="eager", output_attentions=True)
    apply(eager, "dense")
    with pytest.raises(NotImplementedError, match="`output_attentions=True` is not supported"):
        eager(INPUT)


def test_dropout_while_training() -> None:
    model = apply(tiny("llama", attention_dropout=0.1), "dense")
    model(INPUT)
    with pytest.raises(NotImplementedError, match=r"dropout is not supported.*got 0\.1"):
        model.train()(INPUT)


@pytest.mark.parametrize("argument", ["position_bias", "head_mask", "sinks", "indices"])
def test_arguments_that_would_be_ignored(model: PreTrainedModel, argument: str) -> None:
    with pytest.raises(NotImplementedError, match=f"`{argument}` is not supported"):
        model(INPUT, **{argument: torch.zeros(1, 4, 20, 20)})


def test_t5_position_bias() -> None:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, attn_implementation="longctx"
    )
    model = transformers.T5EncoderModel(config).eval()
    with pytest.raises(NotImplementedError, match="`position_bias` is not supported"):
        model(INPUT)


def test_paged_cache(model: PreTrainedModel) -> None:
    q = torch.zeros(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        attention_forward(model.model.layers[0].self_attn, q, q, q, None, cache=object())


def test_continuous_batching_is_refused_by_transformers(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        model.generate_batch([[2, 3, 4]], generation_config=transformers.GenerationConfig(max_new_tokens=2))


def test_cu_seqlens_without_positions(model: PreTrainedModel) -> None:
    offsets = torch.tensor([0, 8, 20], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="pass `position_ids` that restart"):
        model(INPUT, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False)
    position_ids = torch.cat([torch.arange(8), torch.arange(12)])[None]
    model(INPUT, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False, position_ids=position_ids)
    model(INPUT, cu_seq_lens_q=offsets[::2].contiguous(), use_cache=False)  # one document


def test_bidirectional_window_without_its_mask() -> None:
    layer = apply(tiny("mistral"), "dense").model.layers[0].self_attn
    q = torch.zeros(1, 4, 8, 16)
    forward = transformers.AttentionInterface._global_mapping["longctx"]
    with pytest.raises(NotImplementedError, match="bidirectional layer with `sliding_window`"):
        forward(layer, q, q, q, None, is_causal=False, sliding_window=4)


def test_model_off_the_interface() -> None:
    config = transformers.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.FalconForCausalLM(config)
    with pytest.raises(ValueError, match="does not route its attention through transformers' AttentionInterface"):
        apply(model, "dense")


def test_model_without_attention() -> None:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM has no layers that"):
        apply(transformers.MambaForCausalLM(config), "dense")


def test_wrong_options(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="`min_seqlen_q` must be at least 1; got 0"):
        apply(model, "dense", min_seqlen_q=0)
    with pytest.raises(ValueError, match="nosuchpolicy"):
        apply(model, "nosuchpolicy")
    with pytest.raises(ValueError, match="no policy is applied"):
        stats(remove(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_raises(model: PreTrainedModel, checkpointing: bool, reentrant: bool) -> None:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    embeddings = model.get_input_embeddings()(INPUT)
    loss = model(inputs_embeds=embeddings, labels=INPUT).loss
    with pytest.raises(NotImplementedError, match="longctx::attention has no backward yet"):
        loss.backward()
    assert [layer.calls for layer in stats(model).layers] == [1, 1]


def test_block_that_ends_before_backward() -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing re-runs attention in backward"), using(model, "dense"):
        pass
    with torch.no_grad(), using(model, "dense"):
        model(INPUT)
