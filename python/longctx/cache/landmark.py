"""Landmark Attention: the last token of each block, the landmark, opens the block.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers" (arXiv 2305.16300).

A model is trained with a landmark token after every `block_size - 1` tokens. A query gives its softmax to the tokens of
its own block and to the landmarks of the blocks before; what a landmark gets is shared out by a softmax over the other
tokens of its block. So the landmarks say which blocks to read: here the `num_blocks` with the highest, per query head.

That grouped softmax is a merge of attention over each block, in which a block weighs what its landmark says and not
what its own keys sum to.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.cache.base import CallContext, LongctxLayer
from longctx.cache.cache import LongctxCache, require
from longctx.ops import attention, gather_attention, merge_states, token_scores, topk_select


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, num_blocks: int, **scaling: Any
) -> tuple[Tensor, Tensor]:
    """Grouped softmax of the last tokens of one sequence, whose keys `k [1, num_kv_heads, n, head_dim]` all exist.

    Args:
        scaling: `softmax_scale` and `softcap`, as in `longctx.attention`.

    Returns:
        `(out, lse)` as of `longctx.attention`; in `lse`, landmarks count for their blocks. A landmark sees the tokens
        of its own block, and not itself.
    """
    seqlen_q, n = q.shape[2], k.shape[2]
    position = torch.arange(n - seqlen_q, n, device=q.device)
    block, last = position // block_size, block_size - 1
    start = block * block_size
    own = torch.stack([start, torch.minimum(position + 1, start + last)], dim=-1).int()
    states = [attention(q, k, v, key_ranges=own[None, None], **scaling)]
    override = [states[0][1]]
    whole = n // block_size
    if whole > 0:
        landmarks = torch.arange(last, whole * block_size, block_size, dtype=torch.int32, device=q.device)
        scores = token_scores(q, k, candidates=landmarks[None, None, None], **scaling)
        before = block.int().expand(1, q.shape[1], -1).contiguous()
        blocks, counts = topk_select(scores, min(num_blocks, whole), lengths=before)
        opened = scores.gather(3, blocks.clamp(min=0).long()).masked_fill(blocks < 0, -torch.inf)
        # Blocks without their landmarks, as pages; room behind them lets every token see them all.
        k_pages, v_pages = (
            x[0, :, : whole * block_size].unflatten(1, (whole, -1))[:, :, :last].transpose(0, 1) for x in (k, v)
        )
        table = torch.arange(whole + -(-seqlen_q // last), dtype=torch.int32, device=q.device)[None]
        used = torch.full((1,), whole * last + seqlen_q, dtype=torch.int32, device=q.device)
        *_, block_out, block_lse = gather_attention(
            q,
            k_pages,
            v_pages,
            blocks,
            counts,
            block_size_k=last,
            seqused_k=used,
            page_table=table,
            return_block_states=True,
            **scaling,
        )
        states += zip(block_out[:-1], block_lse[:-1], strict=True)
        override += opened.to(block_lse.dtype).unbind(3)
    out, lse = (torch.stack(parts) for parts in zip(*states, strict=True))
    merged: tuple[Tensor, Tensor] = merge_states(out, lse, torch.stack(override))
    return merged


class LandmarkLayer(LongctxLayer):
    def __init__(self, config: Any, layer_idx: int, *, block_size: int, num_blocks: int, **shapes: Any) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        super().__init__(config, layer_idx, **shapes)

    def decodes(self, seqlen_q: int) -> bool:
        """Every call: a prompt too is read by landmarks."""
        if self._padding is not None:
            raise NotImplementedError(
                "longctx: Landmark Attention takes no padding, its landmarks are counted from the first token; give "
                "the rows of a batch the same length"
            )
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        self.count(self.num_blocks * (self.block_size - 1) + self.block_size, q.shape[2])
        sizes = {"block_size": self.block_size, "num_blocks": self.num_blocks}
        scaling: dict[str, Any] = {"softmax_scale": context.softmax_scale, "softcap": context.softcap}
        rows = [slice(b, b + 1) for b in range(q.shape[0])]
        states = [landmark_attention(q[row], k[row], v[row], **sizes, **scaling) for row in rows]
        out, lse = (torch.cat(parts) for parts in zip(*states, strict=True))
        return context.weigh_sinks(out, lse)


class LandmarkCache(LongctxCache):
    """For a model that was trained with landmarks: reads a token's own block and those whose landmarks say so.

    Args:
        config: `model.config`.
        block_size: tokens of a block, the landmark at its end included; 64 in the paper. The text must hold the model's
            landmark token at every `block_size`-th place, generated text too.
        num_blocks: blocks that a query head opens, besides the token's own; 5 in the paper.

    Prompts are read like that as well, each token its own blocks, which takes long for long ones. With `num_blocks` not
    below the number of blocks it is the attention of training. Positions are the true ones: the paper's "stingy"
    positions, for texts beyond the training length, are not made. Do not use it for a model that was not trained with
    landmarks.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.LandmarkCache(model.config, block_size=16, num_blocks=2)
        >>> text = torch.ones(1, 200, dtype=torch.long)
        >>> text[:, 15::16] = 63  # the landmark token
        >>> with torch.no_grad():
        ...     logits = model(text, past_key_values=cache).logits
        >>> logits.shape
        torch.Size([1, 200, 64])
    """

    name: ClassVar[str] = "landmark"

    def __init__(self, config: Any, *, block_size: int = 64, num_blocks: int = 5) -> None:
        require("block_size", block_size, at_least=2)
        require("num_blocks", num_blocks, at_least=1)
        super().__init__(config, LandmarkLayer, {"block_size": block_size, "num_blocks": num_blocks})
