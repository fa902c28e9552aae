"""Makes the name "longctx" known to transformers."""

from __future__ import annotations

import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from longctx.integrations.transformers.attention import attention_forward
from longctx.integrations.transformers.mask import key_ranges_mask

NAME = "longctx"
OLDEST, TOO_NEW = (5, 20), (6,)


def register() -> None:
    """Registers the attention and the mask function, so that ``attn_implementation="longctx"`` is understood.

    Done by itself when transformers is imported after or before longctx; calling it again changes nothing.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not OLDEST <= version < TOO_NEW:
        raise ImportError(f"longctx needs transformers >= 5.20, < 6; found {transformers.__version__}")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_ranges_mask)
