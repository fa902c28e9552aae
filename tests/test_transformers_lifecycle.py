"""Registration, apply and remove, copies, saved models, multimodal models, statistics, torch.compile."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import longctx
from longctx.integrations import supports_transformers
from longctx.integrations.transformers import apply, register, registration, remove, stats, using
from longctx.prefill import AShape, BlockTopK
from transformers_models import padding, tiny, tokens

SPARSE = AShape(num_sink_tokens=4, window_size=20)
INPUT = tokens(1, 60)
# Float32 logits of sdpa itself lie up to 6e-5 from those of a float64 model.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def logits(model: PreTrainedModel, input_ids: Tensor = INPUT) -> Tensor:
    with torch.no_grad():
        return model(input_ids).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny("llama").save_pretrained(path)
    return path


REGISTERED = "from transformers import AttentionInterface; assert 'longctx' in AttentionInterface(); "


@pytest.mark.parametrize(
    "code",
    [
        "import sys, longctx; assert 'transformers' not in sys.modules; "
        + REGISTERED
        + "import inspect, transformers.modeling_utils as m; assert inspect.getsource(m); print(type(m.__loader__))",
        "from transformers import AttentionInterface; import longctx; " + REGISTERED,
        "import longctx.integrations.transformers; " + REGISTERED,
    ],
    ids=["longctx first", "transformers first", "the adapter first"],
)
def test_import_registers(code: str) -> None:
    """Whichever comes first; importing longctx alone imports no transformers, and the hook leaves no trace."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("", "<class '_frozen_importlib_external.SourceFileLoader'>")


def test_unsupported_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ("4.57.1", "5.19.0", "5.20.0", "5.23.0.dev0", "6.0.0")
    assert [supports_transformers(version) for version in versions] == [False, False, True, True, False]
    monkeypatch.setattr(registration.transformers, "__version__", "5.19.0")
    with pytest.raises(ImportError, match=r"needs transformers >= 5.20, < 6; found 5.19.0"):
        register()


def test_loaded_with_our_attention(checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="longctx")
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    apply(ours, SPARSE, min_seqlen_q=16)
    assert not torch.allclose(logits(ours), logits(theirs), atol=1e-3)
    remove(ours)
    assert ours.config._attn_implementation == "longctx"
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def test_short_name() -> None:
    model = tiny("llama")
    assert longctx.apply(model, "dense") is model


def test_remove_restores_the_model() -> None:
    model = tiny("gemma2")  # on eager attention
    before, attributes = logits(model), {name: set(vars(m)) for name, m in model.named_modules()}
    apply(model, "dense")
    apply(model, SPARSE, min_seqlen_q=16)
    assert not torch.equal(logits(model), before)
    remove(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model), before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    remove(model)  # nothing left to do


def test_using_nests_and_restores() -> None:
    model = tiny("llama")
    before = logits(model)
    with using(model, SPARSE, min_seqlen_q=16) as inside:
        assert inside is model
        sparse = logits(model)
        with using(model, "dense"):
            torch.testing.assert_close(logits(model), before, **CLOSE)
            assert stats(model).layers[0].policy == "dense"
        assert torch.equal(logits(model), sparse)
        assert stats(model).layers[0].sparse_calls == 2
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="mine"), using(model, SPARSE):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), before)
    apply(model, "dense")
    with using(model, SPARSE, min_seqlen_q=16):
        logits(model)
    assert stats(model).layers[0].policy == "dense"
    assert stats(model).layers[0].calls == 0


def test_short_calls_run_dense() -> None:
    model = apply(tiny("llama"), SPARSE)
    torch.testing.assert_close(logits(model), logits(tiny("llama")), **CLOSE)
    assert stats(model).layers[0].dense_reasons == {"seqlen_q < 1024": 1}
    logits(model, tokens(1, 1024))
    assert stats(model).layers[0].sparse_calls == 1


def test_bidirectional_calls_run_dense() -> None:
    model = apply(tiny("llama"), SPARSE, min_seqlen_q=16)
    with torch.no_grad():
        model(INPUT, is_causal=False, use_cache=False)
    assert stats(model).layers[0].dense_reasons == {"not causal": 1}


@pytest.mark.runs_on("cpu", reason="a replaced kernel is seen twice by the profiler")
def test_kernels_really_ran() -> None:
    """The profiler sees one call of our op a layer, and no attention of torch's."""
    model = apply(tiny("llama"), BlockTopK(top_k=2, block_size=32), min_seqlen_q=64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits(model, tokens(1, 300))
        logits(model)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["longctx::block_sparse_attention"] == 2
    assert calls["longctx::attention"] == 2
    assert not [key for key in calls if "scaled_dot_product" in key]
    assert [(layer.sparse_calls, layer.dense_calls) for layer in stats(model).layers] == [(1, 1), (1, 1)]


def test_stats_table() -> None:
    model = apply(tiny("llama"), SPARSE, min_seqlen_q=16)
    assert stats(model).never_reached == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert stats(model).density is None
    assert str(stats(model)).count("never reached") == 2
    with torch.inference_mode():
        model(INPUT)
    model(INPUT[:, :8])
    position_embeddings = model.model.rotary_emb(torch.zeros(1), torch.arange(20)[None])
    model.model.layers[1](torch.zeros(1, 20, 64), position_embeddings=position_embeddings)
    table = stats(model)
    assert [layer.layer_idx for layer in table.layers] == [0, 1]
    assert [layer.calls for layer in table.layers] == [2, 3]
    assert isinstance(table.layers[0].density, Tensor)
    line = str(table).splitlines()[1]
    assert line.split()[:5] == ["model.layers.0.self_attn", "ashape", "1", "1", f"{float(table.layers[0].density):.4f}"]
    assert line.endswith("seqlen_q < 16 (1)")


def test_deepcopy_and_pickle_carry_the_policy() -> None:
    model = apply(tiny("llama"), SPARSE, min_seqlen_q=16)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert [layer.calls for layer in stats(other).layers] == [2, 2]
    assert [layer.calls for layer in stats(model).layers] == [1, 1]
    rope_model = copy.deepcopy(apply(tiny("llama"), "lminfinite:num_global_tokens=2,window_size=20", min_seqlen_q=16))
    state = rope_model.model.layers[0].self_attn._longctx
    assert state.rope.rotary_emb is rope_model.model.rotary_emb


def test_saved_model_knows_nothing_of_us(tmp_path: Path) -> None:
    model = tiny("llama")
    keys = set(model.state_dict())
    apply(model, "lminfinite", min_seqlen_q=16)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert "longctx" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(loaded), logits(tiny("llama")))


def test_multimodal_models_change_their_text_part_only() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=tiny("llama").config,
        image_token_index=95,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    image = {"pixel_values": torch.randn(1, 3, 8, 8), "input_ids": torch.cat([torch.full((1, 4), 95), INPUT % 95], 1)}
    with torch.no_grad():
        expected = model(**image).logits
        apply(model, "dense")
        torch.testing.assert_close(model(**image).logits, expected, **CLOSE)
    assert model.config.text_config._attn_implementation == "longctx"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert [layer.name for layer in stats(model).layers] == [
        f"model.language_model.layers.{i}.self_attn" for i in range(2)
    ]
    assert stats(model).never_reached == ()
    remove(model)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_head_counts_come_from_the_tensors() -> None:
    """Under tensor parallelism a rank holds fewer heads than the config says."""
    model = apply(tiny("llama"), "dense")
    layer = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 2, 30, 16), torch.randn(1, 1, 30, 16), torch.randn(1, 1, 30, 16)
    out, weights = transformers.AttentionInterface._global_mapping["longctx"](layer, q, k, v, None, scaling=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None
    assert out.is_contiguous()


def test_compile_dense() -> None:
    """One graph, and padding that cannot be expressed still raises when the graph runs."""
    model = apply(tiny("mistral", num_hidden_layers=1), "dense")
    input_ids, attention_mask = tokens(2, 50), padding([50, 31], "left")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    options = {"attention_mask": attention_mask, "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids, **options).logits, model(input_ids, **options).logits)
        holes = attention_mask.clone()
        holes[0, [4, 9]] = 0
        with pytest.raises(RuntimeError, match="more than one gap of padding"):
            compiled(input_ids, attention_mask=holes, use_cache=False)


def test_compile_sparse() -> None:
    model = apply(tiny("llama", num_hidden_layers=1), SPARSE, min_seqlen_q=16)
    expected = logits(model)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected)
    assert stats(model).layers[0].sparse_calls == 2
