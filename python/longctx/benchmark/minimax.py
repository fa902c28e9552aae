"""The attention of a MiniMax lightning layer: transformers' loop over blocks beside ours, without the projections."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from longctx import reference
from longctx.benchmark.case import Contenders
from longctx.integrations.transformers import minimax

HEADS, HEAD_DIM = 16, 128  # a quarter of MiniMax-01's heads


class NoGate(nn.Module):
    """Instead of the projection of the output gate: a number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=x.dtype)


class Catch(nn.Module):
    """Instead of the norm: keeps what attention gave, and hands on next to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.caught = x
        return x[:, :1, :1]


def contenders(length: int, dtype: torch.dtype) -> Contenders:
    """A layer whose input is q, k and v themselves, for every head one after the other."""
    layer_types = ["linear_attention"] * 8
    config = MiniMaxConfig(
        num_attention_heads=HEADS, head_dim=HEAD_DIM, num_hidden_layers=len(layer_types), layer_types=layer_types
    )
    stock = MiniMaxLightningAttention(config, layer_idx=1).to(dtype).requires_grad_(False)
    for part in ("qkv_proj", "act_fn", "out_proj"):
        setattr(stock, part, nn.Identity())
    stock.norm, stock.output_gate = Catch(), NoGate()  # type: ignore[assignment]
    ours = copy.deepcopy(stock)
    minimax.switch(ours, on=True)

    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, length, HEADS, 3, HEAD_DIM, generator=generator)
    qkv[:, :, :, 1] *= 0.1 * HEAD_DIM**-0.5  # outputs near 1: they are compared by absolute error
    x = qkv.flatten(2).to(dtype)
    q, k, v = x.view(1, length, HEADS, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)

    def twin() -> Tensor:
        out, _ = reference.linear_attention(q, k, v, minimax.log_decay(ours))
        return out.transpose(1, 2).flatten(2)

    def attend(layer: nn.Module) -> Tensor:
        layer(x, None, None)
        return cast(Tensor, cast(Catch, layer.norm).caught)

    run = {"longctx": lambda: attend(ours), "transformers": lambda: attend(stock)}
    flops = float(HEADS * length * HEAD_DIM * (2 * 64 + 4 * HEAD_DIM))
    return Contenders(run, flops, 4 / 3 * x.nbytes, exact=twin)
