"""Caches by name, and caches from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from longctx.cache.cache import FORMAT, LongctxCache


def make_cache(config: Any, name: str, **options: Any) -> LongctxCache:
    """A cache by the name of its method.

    Args:
        config: `model.config` of the model it will be used with.
        name: such as ``"quest"``.
        options: keywords of the method's class, such as `QuestCache`.

    Example:
        >>> import torch, longctx, transformers
        >>> config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
        >>> model = longctx.apply(transformers.LlamaForCausalLM(config), "dense")
        >>> cache = longctx.cache.make_cache(model.config, "dense")
        >>> tokens = model.generate(torch.ones(1, 8, dtype=torch.long), **cache.as_argument(), max_new_tokens=4)
        >>> cache.get_seq_length()
        11
    """
    cache: LongctxCache = _find(name)(config, **options)
    return cache


def load(path: str | Path, config: Any, *, device: str | torch.device = "cpu", **handles: Any) -> LongctxCache:
    """The cache that `LongctxCache.save` wrote to `path`, on `device`, for the model that `config` belongs to.

    `handles` are options that a file cannot hold, such as the `rope` of `StreamingCache`.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"longctx: `path` must be a file that a cache saved; got {path}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safetensors has no iteration)
    header = json.loads(metadata["longctx"])
    cache = make_cache(config, header["name"], **header["options"], **handles)
    cache.restore(header["layers"], tensors)
    return cache


def _find(name: str) -> Any:
    known = {cls.name: cls for cls in _subclasses(LongctxCache)}
    if name not in known:
        raise ValueError(f"longctx: `name` must be one of {', '.join(sorted(known))}; got {name!r}")
    return known[name]


def _subclasses(cls: type[LongctxCache]) -> list[type[LongctxCache]]:
    """Every method, a user's own included."""
    return [leaf for child in cls.__subclasses__() for leaf in (child, *_subclasses(child))]
