"""Tiny randomly initialised models of the supported families, and the implementation each is compared with."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

WINDOW = 16
VOCAB = 96
# Gemma 2 (softcap) and gpt-oss (sinks) have no sdpa implementation.
PEERS = {
    "llama": "sdpa",
    "qwen2": "sdpa",
    "qwen3": "sdpa",
    "mistral": "sdpa",
    "phi3": "sdpa",
    "gemma2": "eager",
    "gpt_oss": "eager",
}
NAMES = tuple(PEERS)
_CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gpt_oss": "GptOss",
    "granite": "Granite",
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
        "attn_implementation": PEERS.get(name, "sdpa"),
    }
    return getattr(transformers, _CLASSES[name] + "Config")(**{**settings, **_EXTRA.get(name, {}), **options})


def tiny(name: str, **options: object) -> PreTrainedModel:
    """A two-layer float32 model in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return getattr(transformers, _CLASSES[name] + "ForCausalLM")(config(name, **options)).eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], side: str) -> Tensor:
    """2-D attention mask of sequences of these lengths."""
    total = max(lengths)
    rows = [[0] * (total - n) + [1] * n if side == "left" else [1] * n + [0] * (total - n) for n in lengths]
    return torch.tensor(rows)
