"""Naive twins of the ops: the formula in float64, for tests and for reading. Slow on purpose.

A twin takes the arguments of its op, computes in float64 and rounds once, to the dtypes the op
returns. Nothing here is shared with the kernels: masks are plain boolean tensors.
"""

from __future__ import annotations

from longctx.reference.attention import attention
from longctx.reference.attention_mass import attention_mass
from longctx.reference.block_scores import block_scores
from longctx.reference.block_sparse_attention import block_sparse_attention
from longctx.reference.gather_attention import gather_attention
from longctx.reference.kmeans import kmeans
from longctx.reference.kv_rows import append_kv, compact_kv, gather_kv, truncate_kv
from longctx.reference.linear_attention import linear_attention, linear_attention_decode, linear_attention_states
from longctx.reference.merge_states import merge_states
from longctx.reference.page_scores import page_scores
from longctx.reference.select_blocks import select_blocks
from longctx.reference.summarize_pages import summarize_pages, update_pages
from longctx.reference.threshold_select import threshold_select
from longctx.reference.token_scores import token_scores
from longctx.reference.topk_select import topk_select

__all__ = [
    "append_kv",
    "attention",
    "attention_mass",
    "block_scores",
    "block_sparse_attention",
    "compact_kv",
    "gather_attention",
    "gather_kv",
    "kmeans",
    "linear_attention",
    "linear_attention_decode",
    "linear_attention_states",
    "merge_states",
    "page_scores",
    "select_blocks",
    "summarize_pages",
    "threshold_select",
    "token_scores",
    "topk_select",
    "truncate_kv",
    "update_pages",
]
