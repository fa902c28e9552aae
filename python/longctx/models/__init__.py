"""Models that longctx brings itself: transformers models, known to its Auto classes once this is imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longctx.models.lightning_cache import LightningCache
from longctx.models.transnormer import TransNormerConfig, TransNormerLM, TransNormerModel

__all__ = ["LightningCache", "TransNormerConfig", "TransNormerLM", "TransNormerModel"]

AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig, exist_ok=True)
AutoModel.register(TransNormerConfig, TransNormerModel, exist_ok=True)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerLM, exist_ok=True)
