"""Makes the name "longctx" known to transformers."""

from __future__ import annotations

import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from longctx.integrations import supports_transformers
from longctx.integrations.transformers.attention import attention_forward
from longctx.integrations.transformers.mask import key_ranges_mask

NAME = "longctx"


def register() -> None:
    """Registers the attention and the mask function, so that ``attn_implementation="longctx"`` is understood.

    `import longctx` does this by itself, whichever of the two is imported first; a second call changes nothing.
    """
    if not supports_transformers(transformers.__version__):
        raise ImportError(f"longctx needs transformers >= 5.20, < 6; found {transformers.__version__}")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_ranges_mask)
