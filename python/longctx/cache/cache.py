"""The cache of a whole model: one `LongctxLayer` a layer, and what concerns all of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from longctx.cache.base import LongctxLayer
from longctx.cache.stats import CacheStats
from longctx.cache.storage import Storage
from longctx.cache.workspaces import Workspaces

FORMAT = "longctx cache 1"
# What this transformers calls a cache: "past_key_values" up to 5.23, then "cache".
CACHE_NAME = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"


class LongctxCache(Cache):
    """A cache for `generate`, of a model that runs on ``attn_implementation="longctx"``; a subclass is a method.

    Args:
        config: `model.config` of the model it will be used with: the very object.
        layer_type: what its layers are.
        options: keywords of `layer_type`, beside config and index.
        max_cache_len: room for so many tokens, allocated once: static shapes, for a compiled `generate`. `None` grows.
        handles: further keywords of `layer_type` that no file can hold.
    """

    name: ClassVar[str]
    # Tensors [batch, ...] of the cache itself, None or replaced; they follow the batch and files, as in a layer.
    STATE: ClassVar[tuple[str, ...]] = ()
    layers: list[LongctxLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: Any,
        layer_type: type[LongctxLayer],
        options: dict[str, Any],
        max_cache_len: int | None = None,
        **handles: Any,
    ) -> None:
        self.config = config.get_text_config(decoder=True)
        self.options = options
        self.max_cache_len = max_cache_len
        if max_cache_len is not None:
            require("max_cache_len", max_cache_len, at_least=1)
        _refuse(self.config)
        options = {**options, **handles, "max_cache_len": max_cache_len}
        layers = range(self.config.num_hidden_layers)
        super().__init__(layers=[layer_type(self.config, i, **options) for i in layers])
        self._share_workspace()
        for name in self.STATE:
            setattr(self, name, None)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options}): {len(self)} layers, {int(self.get_seq_length())} tokens"

    def as_argument(self) -> dict[str, LongctxCache]:
        """`{name: self}` for `generate` and models: `past_key_values` up to transformers 5.23, then `cache`."""
        return {CACHE_NAME: self}

    def __deepcopy__(self, memo: dict[int, Any]) -> LongctxCache:
        return self.fork()

    def fill(self, keys_and_values: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Appends keys and values `[batch, num_kv_heads, n, dim]` of every layer that were computed elsewhere.

        A method that looks at the queries of a prompt sees zeros; `LongctxLayer.fill` takes them too.
        """
        for layer, (keys, values) in zip(self.layers, keys_and_values, strict=True):
            layer.fill(keys, values)

    def rewind(self, num_tokens: int) -> None:
        """Forgets the last `num_tokens` tokens of every row."""
        if not 0 <= num_tokens <= int(self.get_seq_length()):
            raise ValueError(
                f"longctx: `num_tokens` must be between 0 and the {int(self.get_seq_length())} tokens of the cache; "
                f"got {num_tokens}"
            )
        self.crop(-num_tokens)

    def fork(self) -> LongctxCache:
        """A cache that goes its own way from here. Costs nothing until both have been written to: copy on write."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, layers=[layer.fork() for layer in self.layers])
        twin._share_workspace()
        return twin

    def _share_workspace(self) -> None:
        """Of this cache alone: another one may run at the same time."""
        workspaces = Workspaces()
        for layer in self.layers:
            layer.workspaces = workspaces
            if layer.is_initialized:
                layer.make_workspace()

    def reset(self) -> None:
        super().reset()
        for name in self.STATE:
            setattr(self, name, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not torch.equal(beam_idx, torch.arange(beam_idx.shape[0], device=beam_idx.device)):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            self._rebatch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rebatch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rebatch(lambda x: x[indices.to(x.device)])

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self.STATE:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def stats(self) -> CacheStats:
        """What every layer read while decoding, since it was made or reset."""
        return CacheStats(tuple(layer.counts for layer in self.layers))

    def save(self, path: str | Path) -> None:
        """Writes the cache to a safetensors file, from which `longctx.cache.load` makes it again."""
        if self.max_cache_len is not None:
            raise NotImplementedError("longctx: a cache with `max_cache_len` cannot be saved; use one that grows")
        layers = []
        tensors = {name: getattr(self, name) for name in self.STATE if getattr(self, name) is not None}
        for layer in self.layers:
            entry: dict[str, Any] = {name: getattr(layer, name) for name in layer.PLAIN}
            entry["ends"] = {}
            for name in ("_k", "_v", "rows", *layer.STATE):
                value = getattr(layer, name)
                if isinstance(value, Storage):
                    entry["ends"][name] = end = layer.slots if name in ("_k", "_v") else value.end
                    value = value.data[:, :, :end]
                if value is not None:
                    tensors[f"{layer.layer_idx}.{name}"] = value.contiguous()
            layers.append(entry)
        header = {"name": self.name, "options": self.options, "layers": layers}
        save_file(tensors, path, {"format": FORMAT, "longctx": json.dumps(header)})

    def restore(self, layers: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        for name in self.STATE:
            setattr(self, name, tensors.get(name))
        for layer, entry in zip(self.layers, layers, strict=True):
            prefix = f"{layer.layer_idx}."
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if not found:
                continue
            layer.lazy_initialization(found["_k"], found["_v"])
            for name, value in found.items():
                end = entry["ends"].get(name)
                setattr(layer, name, value if end is None else Storage(value, end))
            for name in layer.PLAIN:
                setattr(layer, name, entry[name])


def require(option: str, value: int, *, at_least: int, odd: bool = False) -> None:
    """The one message format of option checks."""
    if value < at_least or (odd and value % 2 == 0):
        raise ValueError(f"longctx: `{option}` must be {'odd and ' * odd}at least {at_least}; got {value}")


def _refuse(config: Any) -> None:
    """Raises on models whose layers keep something else than the keys and values of all tokens."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (window is not None and getattr(config, "layer_types", None) is None):
        raise NotImplementedError(
            "longctx: caches are for models whose layers all attend to the whole past; got "
            + (
                f"`sliding_window` = {window}"
                if kinds == {"full_attention"}
                else f"layer types {', '.join(sorted(kinds))}"
            )
        )
    if getattr(config, "kv_lora_rank", None) is not None or getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"longctx: caches are for decoders that keep keys and values as they are; got {config.model_type}"
        )
