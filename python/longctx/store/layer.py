"""One layer of a page store: tokens in, attention over selected pages out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longctx.store.attend import TierPart, merge_parts
from longctx.store.selection import attend_pages, by_lane, part_of, selected_pages
from longctx.store.tiers import Tiers
from longctx.store.tokens import StoredTokens


class StoreLayer(StoredTokens):
    """What a cache layer needs: `append`, `attend`, `read`, `rewind`, `share`."""

    def __init__(self, tiers: Tiers, index: int) -> None:
        super().__init__(tiers, index)
        self._clock: dict[range, int] = {}  # the host's, before the last `attend` of these sequences

    def attend(
        self,
        q: Tensor,
        indices: Tensor,
        counts: Tensor | None = None,
        *,
        sequences: range | None = None,
        block_size_k: int | None = None,
        num_first: int = 0,
        num_last: int = 0,
        bias: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        ahead: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`gather_attention` over this layer's tokens, wherever they are.

        Selected pages on the device are attended to there, the others on the host, where absent ones are read from the
        disk first; the parts are merged, and what the host attended to is copied to the device for the next step. A
        selection that does not fit in memory is read and attended to in pieces.

        Args:
            q: `[len(sequences), num_q_heads, seqlen_q, head_dim]`; its last token is the last one appended.
            indices, counts, bias: as in `gather_attention`, entries of `block_size_k` tokens; heads 1, `num_kv_heads`
                or `num_q_heads`.
            block_size_k: tokens of an entry; divides the store's page size, which is the default.
            num_first, num_last, softmax_scale, softcap: as in `gather_attention`.
            ahead: int32 `[len(sequences), heads, seqlen_q, n]`, pages that the next token may want, such as those that
                scored next best: brought in the background; negative ones are skipped.

        Returns:
            `(out [batch, num_q_heads, seqlen_q, head_dim_v], lse [batch, num_q_heads, seqlen_q])`.

        The selection is read on the host, one synchronisation with the GPU: what to bring is decided there.
        """
        g, tiers = self.geometry, self.tiers
        tiers.check_open()
        sequences = self._all if sequences is None else sequences
        block = g.page_size if block_size_k is None else block_size_k
        if block < 1 or g.page_size % block:
            raise ValueError(f"longctx: `block_size_k` must divide the page size {g.page_size}; got {block}")
        if q.dim() != 4 or q.shape[0] != len(sequences) or q.shape[1] % g.num_kv_heads or q.shape[3] != g.head_dim:
            raise ValueError(
                "longctx: `q` must have shape [batch, num_q_heads, seqlen_q, head_dim] = "
                f"[{len(sequences)}, a multiple of {g.num_kv_heads}, *, {g.head_dim}]; got {list(q.shape)}"
            )
        if indices.shape[1] not in (1, g.num_kv_heads, q.shape[1]):
            raise ValueError(
                "longctx: `indices` must have 1, num_kv_heads or num_q_heads heads; "
                f"got {list(indices.shape)} for {q.shape[1]} query and {g.num_kv_heads} kv heads"
            )
        # A lane is a batch entry with one kv head: so lanes have page tables of their own.
        lanes = self._lanes(sequences)
        lengths = np.repeat(self.lengths[sequences.start : sequences.stop], g.num_kv_heads)
        lane_q = q.reshape(len(lanes), q.shape[1] // g.num_kv_heads, q.shape[2], q.shape[3])
        lane_indices = by_lane(indices, g.num_kv_heads)
        lane_counts = None if counts is None else by_lane(counts, g.num_kv_heads)
        forced = {"num_first": num_first, "num_last": num_last}
        selection = selected_pages(
            g, lanes, lengths, lane_indices, lane_counts, block_size_k=block, seqlen_q=q.shape[2], **forced
        )
        clock = tiers.host.frames.clock
        since = self._clock.get(sequences, clock)
        self._clock[sequences] = clock
        states = attend_pages(
            tiers,
            lanes,
            g.num_pages(int(lengths.max(initial=0))),
            lane_q,
            selection,
            lane_indices,
            lane_counts,
            bias=None if bias is None else by_lane(bias, g.num_kv_heads),
            block_size_k=block,
            seqused_k=torch.from_numpy(lengths.astype(np.int32)),
            softmax_scale=softmax_scale,
            softcap=softcap,
            **forced,
        )
        # What others asked for since this layer's last token they are about to ask for again: it stays.
        tiers.selected[self.index][sequences] = selection
        following = (self.index + 1) % g.num_layers
        for others, again in list(tiers.selected[following].items()):
            tiers.prefetch((following, others, "again"), *again, since=since)
        if ahead is not None and tiers.ahead is not None:
            wished = by_lane(ahead, g.num_kv_heads).cpu().numpy().reshape(len(lanes), -1)
            there = np.nonzero((wished >= 0) & (wished * g.page_size < lengths[:, None]))
            tiers.prefetch((self.index, sequences, "ahead"), lanes[there[0]], wished[there], since=since)
        out, lse = merge_parts(states, lane_q)
        shape = q.shape[:3]
        return out.reshape(*shape, g.head_dim_v), lse.reshape(shape)

    @contextlib.contextmanager
    def fetch(self, pages: Tensor) -> Iterator[TierPart]:
        """Brings pages to the host and holds them there while the block runs.

        Args:
            pages: int `[batch, 1 or num_kv_heads, n]`; negative ones are skipped.

        Yields:
            frames and page table for `gather_attention`, whose batch is the layer's lanes: q as `[batch * num_kv_heads,
            group_size, seqlen_q, head_dim]`, one kv head.
        """
        g = self.geometry
        lengths = np.repeat(self.lengths, g.num_kv_heads)
        indices = by_lane(pages.unsqueeze(2), g.num_kv_heads)
        chosen = selected_pages(g, self.lanes, lengths, indices, block_size_k=g.page_size)
        with self.tiers.hold_host(*chosen) as frames:
            yield part_of(self.tiers.host, self.lanes, g.num_pages(self.num_tokens), *chosen, frames)
