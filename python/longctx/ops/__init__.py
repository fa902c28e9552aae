"""One file an op: the function with its docstring, its fake kernel and its gradient rule."""

from longctx import _library

_library.load()

from longctx.ops._linear import CHUNK_SIZE as LINEAR_CHUNK_SIZE  # noqa: E402, F401
from longctx.ops.append_kv import append_kv  # noqa: E402
from longctx.ops.attention import attention  # noqa: E402
from longctx.ops.attention_mass import attention_mass  # noqa: E402
from longctx.ops.block_scores import block_scores  # noqa: E402
from longctx.ops.block_sparse_attention import block_sparse_attention  # noqa: E402
from longctx.ops.compact_kv import compact_kv  # noqa: E402
from longctx.ops.gather_attention import gather_attention  # noqa: E402
from longctx.ops.gather_kv import gather_kv  # noqa: E402
from longctx.ops.kmeans import kmeans  # noqa: E402
from longctx.ops.linear_attention import linear_attention  # noqa: E402
from longctx.ops.linear_attention_decode import linear_attention_decode  # noqa: E402
from longctx.ops.linear_attention_states import linear_attention_states  # noqa: E402
from longctx.ops.merge_states import merge_states  # noqa: E402
from longctx.ops.page_scores import page_scores  # noqa: E402
from longctx.ops.select_blocks import select_blocks  # noqa: E402
from longctx.ops.summarize_pages import summarize_pages  # noqa: E402
from longctx.ops.threshold_select import threshold_select  # noqa: E402
from longctx.ops.token_scores import token_scores  # noqa: E402
from longctx.ops.topk_select import topk_select  # noqa: E402
from longctx.ops.truncate_kv import truncate_kv  # noqa: E402
from longctx.ops.update_pages import update_pages  # noqa: E402

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
