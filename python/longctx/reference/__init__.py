"""Naive twins of the ops: the formula in float64, for tests and for reading. Slow on purpose.

A twin takes the arguments of its op, computes in float64 and rounds once, to the dtypes the op
returns. Nothing here is shared with the kernels: masks are plain boolean tensors.
"""

from __future__ import annotations

from longctx.reference.attention import attention
from longctx.reference.block_sparse_attention import block_sparse_attention
from longctx.reference.merge_states import merge_states

__all__ = ["attention", "block_sparse_attention", "merge_states"]
