"""Landmark Attention: the last token of each block, the landmark, opens the block.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers" (arXiv 2305.16300).

A model is trained with a landmark token after every `block_size - 1` tokens. A query gives its softmax to the tokens of
its own block and to the landmarks of the blocks before; what a landmark gets is shared out by a softmax over the other
tokens of its block. So the landmarks say which blocks to read: here the `num_blocks` with the highest, per query head.

That grouped softmax is a merge of attention over each block, in which a block weighs what its landmark says and not
what its own keys sum to.

Texts beyond the length of training take the paper's "stingy" positions: in front of a token's own block there is room
for `num_blocks + 1` blocks. Of the last `num_blocks`, those that it opens stand at the right end of that room, the
others at its left end, both in their order. While blocks are chosen, the last ones stand where they are and all before
them in the first place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.cache.cache import LongctxCache, require
from longctx.cache.call import CallContext
from longctx.cache.positions import Turns, rerotate
from longctx.cache.refusals import Unpadded
from longctx.cache.storage import Storage
from longctx.ops import attention, gather_attention, merge_states, page_scores, token_scores, topk_select
from longctx.prefill.policy import Rope


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    turns: Turns | None = None,
    landmarks: Tensor | None = None,
    **scaling: Any,
) -> tuple[Tensor, Tensor]:
    """Grouped softmax of the last tokens of one sequence, whose keys `k [1, num_kv_heads, n, head_dim]` all exist.

    Args:
        turns: moves blocks to stingy positions, by multiples of `block_size`. `None`: true positions.
        landmarks: `[1, num_kv_heads, n // block_size, head_dim]`, with `turns`: the landmarks' keys at position 0.
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
    out, lse = attention(q, k, v, key_ranges=own[None, None], **scaling)
    whole = n // block_size
    if whole == 0:
        return out, lse
    at = torch.arange(last, whole * block_size, block_size, dtype=torch.int32, device=q.device)
    scores = token_scores(q, k, candidates=at[None, None, None], **scaling)
    if turns is not None:
        assert landmarks is not None
        distance = (position - start + num_blocks * block_size + 1)[None]  # to the landmark of the first place
        moved = rerotate(q, position[None], distance, turns.rope)
        far = page_scores(moved, landmarks, method="dot", softmax_scale=scaling.get("softmax_scale"))
        softcap = scaling.get("softcap") or 0.0
        far = softcap * torch.tanh(far / softcap) if softcap > 0.0 else far
        recent = torch.arange(whole, device=q.device) >= block[:, None] - num_blocks
        scores = torch.where(recent, scores, far)
    before = block.int().expand(1, q.shape[1], -1)
    blocks, counts = topk_select(scores, min(num_blocks, whole), lengths=before.contiguous())
    places: dict[str, Any] = {}
    if turns is not None:
        rank = torch.arange(blocks.shape[3], dtype=torch.int32, device=q.device)
        at_the_left = blocks < before[..., None] - num_blocks
        place = rank + torch.where(at_the_left, 0, num_blocks + 1 - counts[..., None])
        places = {
            "k_positions": (before[..., None] - num_blocks - 1 + place - blocks).int(),
            "k_position_step": 0,
            "q_positions": torch.zeros(1, seqlen_q, dtype=torch.int32, device=q.device),
            "rope_cos_sin": turns.table(whole + 1, q.device),
        }

    def states_of(keys: slice, size: int) -> tuple[Tensor, Tensor]:
        """Attention over these keys of every opened block, alone. They are pages; behind them is room for q."""
        k_pages, v_pages = (
            x[0, :, : whole * block_size].unflatten(1, (whole, -1))[:, :, keys].transpose(0, 1) for x in (k, v)
        )
        table = torch.arange(whole + -(-seqlen_q // size), dtype=torch.int32, device=q.device)[None]
        used = torch.full((1,), whole * size + seqlen_q, dtype=torch.int32, device=q.device)
        pages: dict[str, Any] = {"block_size_k": size, "seqused_k": used, "page_table": table}
        *_, block_out, block_lse = gather_attention(
            q, k_pages, v_pages, blocks, counts, return_block_states=True, **pages, **places, **scaling
        )
        return block_out[:-1], block_lse[:-1]

    block_out, block_lse = states_of(slice(last), last)
    if turns is None:
        opened = scores.gather(3, blocks.clamp(min=0).long()).masked_fill(blocks < 0, -torch.inf).movedim(3, 0)
    else:
        _, opened = states_of(slice(last, None), 1)  # the landmarks themselves, where their blocks now stand
    states = torch.cat([out[None], block_out]), torch.cat([lse[None], block_lse])
    merged: tuple[Tensor, Tensor] = merge_states(*states, torch.cat([lse[None], opened.to(lse.dtype)]))
    return merged


class LandmarkLayer(Unpadded):
    NOT_PADDED = "Landmark Attention takes no padding, its landmarks are counted from the first token"
    STATE: ClassVar[tuple[str, ...]] = ("landmarks",)
    landmarks: Storage | None  # [batch, num_kv_heads, blocks, head_dim]: keys of landmarks at position 0, with `turns`

    def __init__(
        self, config: Any, layer_idx: int, *, block_size: int, num_blocks: int, turns: Turns | None, **shapes: Any
    ) -> None:
        self.block_size, self.num_blocks, self.turns = block_size, num_blocks, turns
        super().__init__(config, layer_idx, **shapes)

    def decodes(self, seqlen_q: int) -> bool:
        """Every call: a prompt too is read by landmarks."""
        super().decodes(seqlen_q)
        return True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> Tensor:
        self.count(self.num_blocks * (self.block_size - 1) + self.block_size, q.shape[2])
        options: dict[str, Any] = {"block_size": self.block_size, "num_blocks": self.num_blocks}
        options.update(softmax_scale=context.softmax_scale, softcap=context.softcap)
        moved: list[dict[str, Any]] = [{}] * q.shape[0]
        if self.turns is not None:
            landmarks = self._landmarks(k, k.shape[2] - q.shape[2], self.turns)
            moved = [{"turns": self.turns, "landmarks": row[None]} for row in landmarks]
        rows = [slice(b, b + 1) for b in range(q.shape[0])]
        states = [
            landmark_attention(q[row], k[row], v[row], **options, **handles)
            for row, handles in zip(rows, moved, strict=True)
        ]
        out, lse = (torch.cat(parts) for parts in zip(*states, strict=True))
        return context.weigh_sinks(out, lse)

    def _landmarks(self, k: Tensor, start: int, turns: Turns) -> Tensor:
        """All landmarks among the keys, of which those from key `start` on are new."""
        size = self.block_size
        first, whole = start // size, k.shape[2] // size
        self.landmarks = Storage.like(k, 0) if self.landmarks is None else self.landmarks
        self.landmarks = self.landmarks.writable(first, whole, first)
        at = torch.arange(first, whole, device=k.device)[None] * size + size - 1
        new = k[:, :, first * size + size - 1 :: size]
        self.landmarks.data[:, :, first:whole] = rerotate(new, at, torch.zeros_like(at), turns.rope)
        return self.landmarks.data[:, :, :whole]


class LandmarkCache(LongctxCache):
    """For a model that was trained with landmarks: reads a token's own block and those whose landmarks say so.

    Args:
        config: `model.config`.
        block_size: tokens of a block, the landmark at its end included; 64 in the paper. The text must hold the model's
            landmark token at every `block_size`-th place, generated text too.
        num_blocks: blocks that a query head opens, besides the token's own; 5 in the paper.
        rope: `longctx.integrations.transformers.find_rope(model)` gives blocks the paper's "stingy" positions: no key
            is farther away than `(num_blocks + 2) * block_size`, so a text may exceed what the model was trained on.
            `None` keeps true positions.

    Prompts are read like that as well, each token its own blocks, which takes long for long ones. With `num_blocks` not
    below the number of blocks it is the attention of training, with or without `rope`. Do not use it for a model that
    was not trained with landmarks, nor `rope` for texts no longer than those of training: true positions tell more.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.LandmarkCache(model.config, block_size=16, num_blocks=2)
        >>> text = torch.ones(1, 200, dtype=torch.long)
        >>> text[:, 15::16] = 63  # the landmark token
        >>> with torch.no_grad():
        ...     logits = model(text, **cache.as_argument()).logits
        >>> logits.shape
        torch.Size([1, 200, 64])
    """

    name: ClassVar[str] = "landmark"

    def __init__(self, config: Any, *, block_size: int = 64, num_blocks: int = 5, rope: Rope | None = None) -> None:
        require("block_size", block_size, at_least=2)
        require("num_blocks", num_blocks, at_least=1)
        options = {"block_size": block_size, "num_blocks": num_blocks}
        turns = None if rope is None else Turns(rope, block_size)
        super().__init__(config, LandmarkLayer, options, turns=turns)
