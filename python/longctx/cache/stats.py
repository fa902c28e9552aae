"""How many keys a cache read, of those it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.cache.call import Counts


@dataclass(frozen=True, eq=False)
class CacheStats:
    """One `Counts` a layer; `print` shows the table."""

    layers: tuple[Counts, ...]

    @property
    def share(self) -> float:
        """Keys read, of those that dense attention over the whole past would have read; 0 before any decoding."""
        stored = sum(layer.keys_stored for layer in self.layers)
        return sum(layer.keys_read for layer in self.layers) / stored if stored else 0.0

    def __str__(self) -> str:
        lines = ["layer  tokens  keys read a token  of"]
        for index, layer in enumerate(self.layers):
            tokens = max(layer.tokens, 1)
            lines.append(
                f"{index:>5}  {layer.tokens:>6}  {layer.keys_read / tokens:>17.1f}  {layer.keys_stored / tokens:.1f}"
            )
        return "\n".join(lines)
