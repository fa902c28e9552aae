"""What one would use instead on a GPU. Each is called through its own interface; what is missing is left out.

A contender that is present but refuses a call, or computes something else, is reported with its error.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]
SDPA_BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def sdpa(inputs: Inputs) -> dict[str, Run]:
    """torch's attention, one contender a backend."""
    q, k = inputs["q"], inputs["k"]
    options = {"is_causal": q.shape[2] > 1, "enable_gqa": q.shape[1] != k.shape[1]}

    def run(inputs: Inputs, backend: str) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"], **options)

    return {f"sdpa {name}": functools.partial(run, backend=backend) for name, backend in SDPA_BACKENDS.items()}


def dense(inputs: Inputs) -> dict[str, Run]:
    """Causal attention over everything."""
    found = sdpa(inputs)
    if installed("flash_attn_interface"):
        found["flash-attn 3"] = functools.partial(_rows_first, module="flash_attn_interface", name="flash_attn_func")
    if installed("flash_attn"):
        found["flash-attn 2"] = functools.partial(_rows_first, module="flash_attn", name="flash_attn_func")
    if installed("flashinfer"):
        found["flashinfer"] = _flashinfer_prefill
    if installed("fla"):
        found["fla"] = _fla
    return found


def decode(inputs: Inputs) -> dict[str, Run]:
    """One query a sequence, which sees every key."""
    found = sdpa(inputs)
    if installed("flashinfer") and inputs["q"].shape[0] == 1:
        found["flashinfer"] = _flashinfer_decode
    return found


def linear(inputs: Inputs) -> dict[str, Run]:
    """Causal linear attention with a decay per head."""
    return {"fla": _fla_linear} if installed("fla") else {}


def linear_decode(inputs: Inputs) -> dict[str, Run]:
    """One token on a state."""
    return {"fla": _fla_linear_decode} if installed("fla") else {}


def flex(inputs: Inputs, tiles: Tensor) -> Run:
    """Compiled FlexAttention over bool [heads, num_q_blocks, num_k_blocks] tiles, those on the diagonal masked."""
    from torch.nn.attention.flex_attention import BlockMask

    heads, rows, columns = tiles.shape
    repeats = inputs["q"].shape[1] // heads
    diagonal = torch.eye(rows, columns, dtype=torch.bool, device=tiles.device).expand_as(tiles)

    def ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask.repeat_interleave(repeats, dim=0)[None]
        order = mask.int().argsort(dim=-1, descending=True, stable=True).int()
        return mask.sum(-1).int(), order

    block_mask = BlockMask.from_kv_blocks(
        *ordered(tiles & diagonal),
        *ordered(tiles & ~diagonal),
        BLOCK_SIZE=inputs["q"].shape[2] // rows,
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    )

    def run(inputs: Inputs) -> Any:
        gqa = inputs["q"].shape[1] != inputs["k"].shape[1]
        return _compiled_flex()(inputs["q"], inputs["k"], inputs["v"], block_mask=block_mask, enable_gqa=gqa)

    return run


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _rows_first(inputs: Inputs, module: str, name: str) -> Tensor:
    """flash-attn: [batch, seqlen, heads, dim]; the transposed views have the strides it accepts."""
    attention = getattr(importlib.import_module(module), name)
    out = attention(*(inputs[x].transpose(1, 2) for x in ("q", "k", "v")), causal=True)
    return _first(out).transpose(1, 2)


def _first(result: Any) -> Tensor:
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _fla(inputs: Inputs) -> Tensor:
    attention = importlib.import_module("fla.ops.attn").parallel_attn
    out = attention(*(inputs[x].transpose(1, 2).contiguous() for x in ("q", "k", "v")))
    return _first(out).transpose(1, 2)


def _fla_linear(inputs: Inputs) -> Tensor:
    """[batch, seqlen, heads, dim], which is how the inputs lie in memory."""
    linear_attention = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v = (inputs[x].transpose(1, 2) for x in ("q", "k", "v"))
    return _first(linear_attention(q, k, v, g_gamma=inputs["log_decay"], scale=1.0)).transpose(1, 2)


def _fla_linear_decode(inputs: Inputs) -> Tensor:
    """Writes the new state elsewhere."""
    decode = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    q, k, v = (inputs[x].transpose(1, 2) for x in ("q", "k", "v"))
    options = {"g_gamma": inputs["log_decay"], "initial_state": inputs["other_state"], "output_final_state": True}
    return _first(decode(q, k, v, scale=1.0, **options)).transpose(1, 2)


def _flashinfer_prefill(inputs: Inputs) -> Tensor:
    attention = importlib.import_module("flashinfer").single_prefill_with_kv_cache
    q, k, v = (inputs[x][0].transpose(0, 1) for x in ("q", "k", "v"))
    out: Tensor = attention(q, k, v, causal=True)
    return out.transpose(0, 1)[None]


def _flashinfer_decode(inputs: Inputs) -> Tensor:
    attention = importlib.import_module("flashinfer").single_decode_with_kv_cache
    out: Tensor = attention(inputs["q"][0, :, 0], inputs["k"][0], inputs["v"][0], kv_layout="HND")
    return out[None, :, None]
