"""The model's rotary embedding, for the policies that move keys to other positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Models whose every layer rotates the leading channels by halves (`x * cos + rotate_half(x) * sin`) and applies
# nothing to q and k afterwards.
MODEL_TYPES = ("gemma2", "gpt_oss", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Types whose frequencies do not depend on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Rope:
    """`rope(positions [batch, n]) -> (cos, sin)`, float32 `[batch, n, rotary_dim]`, without YaRN's factor on both.

    That factor stays in q and k when a policy rotates them back, and so is neither lost nor applied twice.
    """

    rotary_emb: nn.Module

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq: Tensor = self.rotary_emb.inv_freq  # type: ignore[assignment]
        angles = positions[..., None].float() * inv_freq.to(positions.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def find_rope(model: PreTrainedModel) -> Rope:
    """The rotary embedding of `model`; raises where the rotation is not the one that policies know."""
    model_type = model.config.model_type
    if model_type not in MODEL_TYPES:
        raise NotImplementedError(
            f"longctx: a policy that needs RoPE supports {', '.join(MODEL_TYPES)}; got model type {model_type!r}"
        )
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(modules) != 1:
        raise NotImplementedError(f"longctx: expected one `rotary_emb` in the model; found {len(modules)}")
    rope_type = modules[0].rope_type
    if rope_type not in ROPE_TYPES:
        raise NotImplementedError(
            f"longctx: a policy that needs RoPE supports rope types {', '.join(ROPE_TYPES)}; got {rope_type!r}"
        )
    return Rope(modules[0])


def key_positions(position_ids: Tensor, batch: int, seqlen_k: int, seqused_k: Tensor | None) -> Tensor:
    """RoPE position of every key of K: int64 `[batch, seqlen_k]`.

    The last keys are the queries' own; the ones before them, from the cache, count down from the first query.
    """
    position_ids = position_ids.expand(batch, -1)
    seqlen_q = position_ids.shape[1]
    used = torch.full((batch, 1), seqlen_k, device=position_ids.device) if seqused_k is None else seqused_k[:, None]
    row = torch.arange(seqlen_k, device=position_ids.device)[None] - (used - seqlen_q)
    own = position_ids.gather(1, row.clamp(0, seqlen_q - 1))
    return torch.where(row < 0, position_ids[:, :1] + row, own).clamp(min=0)
