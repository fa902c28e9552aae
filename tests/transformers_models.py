"""Tiny randomly initialised models of the supported families, and the implementation each is compared with."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

WINDOW = 16
VOCAB = 96
NAMES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt_oss")
# Chunked attention (Llama 4), values narrower than keys (DeepSeek V3), one window in two layers (Gemma 3).
MORE_NAMES = ("deepseek_v3", "gemma3", "llama4")
EAGER_PEERS = ("gemma2", "gpt_oss")  # whose softcap and sinks sdpa does not have
_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "granite": ("GraniteConfig", "GraniteForCausalLM"),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
}
_EXTRA = {
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gemma2": {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"sliding_window": WINDOW, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gemma3": {
        "sliding_window": WINDOW,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4": {
        "attention_chunk_size": WINDOW,
        "head_dim": 16,
        "layer_types": ["chunked_attention", "full_attention"],
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
    },
}


def config(name: str, **options: object) -> transformers.PreTrainedConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # Large enough for attention that is far from uniform.
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attn_implementation": "eager" if name in EAGER_PEERS else "sdpa",
    }
    return getattr(transformers, _CLASSES[name][0])(**{**settings, **_EXTRA.get(name, {}), **options})


def tiny(name: str, **options: object) -> PreTrainedModel:
    """A two-layer float32 model in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return getattr(transformers, _CLASSES[name][1])(config(name, **options)).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], side: str) -> Tensor:
    """2-D attention mask of sequences of these lengths."""
    total = max(lengths)
    rows = [[0] * (total - n) + [1] * n if side == "left" else [1] * n + [0] * (total - n) for n in lengths]
    return torch.tensor(rows)
