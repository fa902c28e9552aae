"""What the pages of a store hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, kw_only=True)
class PageGeometry:
    """A page is `page_size` tokens of K and V of one layer, batch entry and kv head: of one *lane*.

    So a selection per kv head reads what it selected and nothing else. 64 tokens of 128 bfloat16 values are 32 KiB,
    which a disk with several reads in flight delivers almost as fast as larger pieces.

    Args:
        num_layers, batch, num_kv_heads: lanes; lane `(layer * batch + sequence) * num_kv_heads + head`.
        page_size: tokens of a page.
        head_dim, head_dim_v: of K and V; `head_dim_v` defaults to `head_dim`.
        dtype: float32, bfloat16 or float16.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int = 0
    batch: int = 1
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.head_dim_v == 0:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        for name in ("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "batch", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"longctx: `{name}` of a page store must be at least 1; got {getattr(self, name)}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"longctx: a page store holds {', '.join(DTYPES)}; got {self.dtype}")

    @classmethod
    def of(cls, config: Any, *, batch: int = 1, page_size: int = 64, dtype: torch.dtype | None = None) -> PageGeometry:
        """For the keys and values of a transformers model, from its `config`, which also gives `dtype`."""
        config = config.get_text_config(decoder=True)
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            batch=batch,
            page_size=page_size,
            dtype=dtype or config.dtype or torch.get_default_dtype(),
        )

    @property
    def lanes_per_layer(self) -> int:
        return self.batch * self.num_kv_heads

    @property
    def num_lanes(self) -> int:
        return self.num_layers * self.lanes_per_layer

    @property
    def page_bytes(self) -> int:
        return self.page_size * (self.head_dim + self.head_dim_v) * self.dtype.itemsize

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def to_file(self) -> dict[str, Any]:
        """The fields as a page file keeps them."""
        fields = asdict(self)
        fields["dtype"] = str(self.dtype).removeprefix("torch.")
        fields["element_bytes"] = self.dtype.itemsize
        return fields

    @classmethod
    def from_file(cls, fields: dict[str, Any]) -> PageGeometry:
        if fields["dtype"] not in DTYPES:
            raise ValueError(f"longctx: a page store holds {', '.join(DTYPES)}; the file holds {fields['dtype']}")
        known = {name: value for name, value in fields.items() if name not in ("dtype", "element_bytes")}
        return cls(**known, dtype=DTYPES[fields["dtype"]])

    def differences(self, other: PageGeometry) -> str:
        """The fields in which `other` differs, as text; empty if none does."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{name} {theirs[name]} and not {mine[name]}" for name in mine if mine[name] != theirs[name])
