"""transformers models on longctx kernels, through its public attention and mask interfaces.

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="longctx")  # our dense kernels
    longctx.apply(model, "flexprefill")                                                # and a sparse prefill

`AttentionInterface` gives a layer's q, k and v after RoPE and after the cache; `AttentionMaskInterface` gives the mask
as a function, which becomes `key_ranges`: two integers a query row instead of a row of booleans.
"""

from longctx.integrations.transformers.model import apply, remove, stats, using
from longctx.integrations.transformers.registration import register
from longctx.integrations.transformers.rope import find_rope
from longctx.integrations.transformers.stats import LayerStats, Stats

__all__ = ["LayerStats", "Stats", "apply", "find_rope", "register", "remove", "stats", "using"]

register()
