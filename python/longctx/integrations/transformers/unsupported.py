"""What a model may ask of its attention function that longctx does not do: an error instead of a wrong result."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from longctx.integrations.transformers.mask import is_key_ranges

# Arguments that some models give their attention function and that would change its result.
UNSUPPORTED = ("position_bias", "sinks", "head_mask", "indices", "block_indices")


def refuse_unsupported(
    module: nn.Module, seqlen_q: int, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raises on everything this function would otherwise silently ignore."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "longctx: paged caches (continuous batching) are not supported; use `model.generate`, or "
            "`attn_implementation='sdpa'` for continuous batching"
        )
    if attention_mask is not None and not is_key_ranges(attention_mask, seqlen_q):
        raise NotImplementedError(
            "longctx: prepared masks are not supported; pass a 2-D `attention_mask` [batch, seqlen], or "
            f"`position_ids` that restart at every document; got {attention_mask.dtype} {list(attention_mask.shape)}"
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise NotImplementedError(
            "longctx: `output_attentions=True` is not supported, the weights never exist; use "
            "`attn_implementation='eager'`"
        )
    if dropout > 0.0:
        raise NotImplementedError(
            f"longctx: attention dropout is not supported; set `attention_dropout = 0.0` in the config; got {dropout}"
        )
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None and cu_seqlens.numel() > 2 and attention_mask is None:
        raise NotImplementedError(
            "longctx: `cu_seq_lens_q` alone does not separate documents; pass `position_ids` that restart at each, "
            "without `attention_mask` and cache"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"longctx: `{name}` is not supported; use `attn_implementation='eager'`")
