"""What a sparse prefill method is: a frozen dataclass that turns q and k into a `Pattern`.

A `Policy` keeps no state between calls: all that varies arrives in an `AttentionContext`. A `Pattern` says which tiles
are visited (a CSR block list) and which scores inside them count (a predicate); a method whose structure does not
depend on the data is a predicate alone.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.ops import attention, block_sparse_attention, select_blocks
from longctx.prefill.cost import MAX_COST, REASON, Lengths
from longctx.prefill.grid import (
    Predicate,
    Rows,
    Sequences,
    Shape,
    block_intervals,
    ceil_div,
    count_blocks,
    disjoint,
    lower_bound,
    token_intervals,
    token_rows,
)

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionContext(Predicate):
    """All a policy may know about a call besides q, k and v.

    The inherited fields say what dense attention would see; a policy only narrows them. Query row `i` of a sequence
    stands at key `i + len_k - len_q`, where `len_k` is `seqused_k` if given: a static cache passes `causal=True`
    with `seqused_k`, and `key_ranges` for padding only.
    """

    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None  # float32 [num_q_heads], an extra logit without a value
    # int [batch, seqlen_k]: RoPE position of every key. None: keys count from 0 in each sequence.
    positions: Tensor | None = None
    layer_idx: int | None = None
    head_offset: int = 0  # first query head of this process under tensor parallelism
    # rope(positions int64 [batch or 1, n]) -> (cos, sin), each [batch or 1, n, rotary_dim] with both halves filled: the
    # model rotates the first rotary_dim channels as x * cos + rotate_half(x) * sin (Llama's convention). A factor on
    # both (YaRN's attention scaling) may be in them or left out: it survives rotating back and forth either way.
    rope: Rope | None = None

    def score_options(self) -> dict[str, Any]:
        """The keywords of an op that decide a score: predicate, scale and cap."""
        return {**self.predicate(), "softmax_scale": self.softmax_scale, "softcap": self.softcap}

    def options(self) -> dict[str, Any]:
        """The keywords of `longctx.attention`."""
        return {**self.score_options(), "sinks": self.sinks}

    def list_options(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """The keywords of `select_blocks` that place its rows."""
        # Counted from `seqused_k` where that is given; packed sequences align by themselves.
        q_offset = (0 if self.seqused_k is not None else k.shape[2]) - q.shape[2]
        if self.cu_seqlens_q is not None:
            q_offset = 0
        return {**self.lengths(), "causal": self.causal, "q_offset": q_offset}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern(Predicate):
    """Which scores a method computes: a block list (None: every visible tile) and a predicate."""

    shape: Shape
    visible: Predicate  # what dense attention sees: the yardstick of `density`
    block_indptr: Tensor | None = None  # int64 [batch or 1, heads_of_pattern, num_q_blocks + 1]
    block_indices: Tensor | None = None  # int32 [capacity]
    block_size_q: int = 128
    block_size_k: int = 128

    @classmethod
    def of(cls, q: Tensor, k: Tensor, context: AttentionContext, **fields: Any) -> Pattern:
        """The pattern of a call: dense attention, narrowed by `fields`."""
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return cls(shape=shape, visible=context, **{**context.predicate(), **fields})

    @classmethod
    def of_tiles(cls, q: Tensor, k: Tensor, context: AttentionContext, tiles: Tensor, block_size: int) -> Pattern:
        """The pattern that visits the tiles set in a bool map [batch, heads, num_q_blocks, num_k_blocks]."""
        blocks: dict[str, Any] = {"block_size_q": block_size, "block_size_k": block_size}
        options = context.list_options(q, k)
        indptr, indices = select_blocks(tiles.float(), method="threshold", value=0.5, **blocks, **options)
        return cls.of(q, k, context, block_indptr=indptr, block_indices=indices, **blocks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Exact attention over the pattern: (out, lse)."""
        options = {**context.options(), **self.predicate()}
        if self.block_indptr is None or self.block_indices is None:
            return attention(q, k, v, **options)
        lists = (self.block_indptr, self.block_indices, self.block_size_q, self.block_size_k)
        return block_sparse_attention(q, k, v, *lists, **options)

    def density(self) -> Tensor:
        """Tiles visited divided by tiles that dense attention visits: a float32 scalar, without a sync."""
        rows = self._rows()
        sizes = (self.block_size_q, self.block_size_k)
        dense = count_blocks(block_intervals(self.visible, self.shape, rows, *sizes)).sum()
        intervals = block_intervals(self, self.shape, rows, *sizes)
        if self.block_indptr is None or self.block_indices is None:
            return (count_blocks(intervals).sum() / dense.clamp(min=1)).float()
        # Entries of a row are ascending: a bisection tells how many lie in each interval.
        first, last = self.block_indptr[:, :, None, :-1], self.block_indptr[:, :, None, 1:]
        begin, end = disjoint(intervals)[:, None].unbind(-1)
        visited = lower_bound(self.block_indices, first, last, end) - lower_bound(
            self.block_indices, first, last, begin
        )
        heads = self.block_indptr.shape[1]
        return (visited.clamp(min=0).sum() / (dense * heads).clamp(min=1)).float()

    def to_mask(self) -> Tensor:
        """The scores that count: bool [batch, num_q_heads, seqlen_q, seqlen_k]. Quadratic, meant for tests."""
        batch, num_q_heads, seqlen_q, seqlen_k = self.shape
        device = (self.block_indptr if self.block_indptr is not None else self._rows().seq).device
        tokens = token_rows(self, self.shape, device)
        key = torch.arange(seqlen_k, device=device) - tokens.k_begin[..., None]  # position of every key
        begin, end = token_intervals(self, self.shape, device)[..., None].unbind(-2)
        mask = ((key[:, None] >= begin) & (key[:, None] < end)).any(1)[:, None]
        if self.block_indptr is None:
            return mask.expand(-1, num_q_heads, -1, -1)
        tiles = self.to_tiles()
        rows = self._rows()
        index, own = rows.tokens(self.block_size_q, seqlen_q)
        row_of_token = torch.zeros(batch, seqlen_q, dtype=torch.int64, device=device)
        row_id = torch.arange(rows.seq.shape[1], device=device)[:, None].expand_as(index)
        # Rows that are not the token's own write to a column that is cut off again.
        row_of_token = torch.nn.functional.pad(row_of_token, (0, 1))
        row_of_token.scatter_(1, torch.where(own, index, seqlen_q).flatten(1), row_id.flatten(1))
        head = torch.arange(num_q_heads, device=device) * tiles.shape[1] // num_q_heads
        listed = tiles.expand(batch, -1, -1, -1)[
            torch.arange(batch, device=device)[:, None, None, None],
            head[:, None, None],
            row_of_token[:, None, :seqlen_q, None],
            (key // self.block_size_k).clamp(0, tiles.shape[3] - 1)[:, None],
        ]
        return mask & listed

    def to_tiles(self) -> Tensor:
        """The block list as a bool map [batch or 1, heads_of_pattern, num_q_blocks, num_k_blocks]."""
        assert self.block_indptr is not None
        assert self.block_indices is not None
        batch, heads, ends = self.block_indptr.shape
        num_k_blocks, capacity = ceil_div(self.shape[3], self.block_size_k), self.block_indices.numel()
        # One spare column takes the -1 behind the last row.
        counts = self.block_indptr.diff(dim=-1).flatten()
        counts = torch.cat([counts, capacity - counts.sum(0, keepdim=True)])
        flat = torch.repeat_interleave(counts, output_size=capacity).mul_(num_k_blocks + 1).add_(self.block_indices)
        tiles = flat.new_zeros(batch * heads * (ends - 1) * (num_k_blocks + 1), dtype=torch.bool).index_fill_(
            0, flat, True
        )
        return tiles.view(batch, heads, ends - 1, num_k_blocks + 1)[..., :num_k_blocks]

    def _rows(self) -> Rows:
        lengths = [t for t in (self.block_indptr, self.cu_seqlens_q, self.seqused_k, self.key_ranges) if t is not None]
        device = lengths[0].device if lengths else torch.device("cpu")
        return Rows.of(Sequences.of(self, self.shape, device), self.shape[2], self.block_size_q)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A published method: its options as fields, its method section as `select`.

    Calls work for batch > 1, GQA, packed sequences (`cu_seqlens_q`, `cu_seqlens_k`), padding (`key_ranges`,
    `seqused_k`) and chunked prefill (`seqlen_q < seqlen_k`).
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the context that the policy cannot do without, such as `rope`."""
        return frozenset()

    @property
    def changes_logits(self) -> bool:
        """Whether scores differ from those of dense attention; its coverage is then undefined."""
        return False

    def least_cost(self, lengths: Lengths) -> float:
        """What selection and attention cost at least, as a share of dense attention; 0 where nothing is known."""
        return 0.0

    def why_dense(self, lengths: Lengths) -> str:
        """Why a call of these lengths should run dense instead; empty if this policy can pay.

        Whoever runs a policy on behalf of a user asks this first (the transformers integration does); a policy that is
        called directly always runs. Where logits change, dense attention replaces a policy only if it is the same.
        """
        return REASON if self.least_cost(lengths) >= (1.0 if self.changes_logits else MAX_COST) else ""

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> Pattern:
        """The scores that this call computes."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """(out, lse) of the method; by default exact attention over the selected pattern."""
        return self.select(q, k, context).attend(q, k, v, context)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """`attend` with the fields of an `AttentionContext` as keywords."""
        return self.attend(q, k, v, AttentionContext(**context))

    def _require(self, field: str, ok: bool, rule: str) -> None:
        """The one message format of option checks."""
        if not ok:
            raise ValueError(f"longctx::{self.name}: `{field}` must {rule}; got {getattr(self, field)!r}")

    def _require_one_of(self, field: str, *legal: int) -> None:
        self._require(field, getattr(self, field) in legal, "be one of " + ", ".join(map(str, legal)))

    def _require_causal(self, context: AttentionContext) -> None:
        if not context.causal:
            raise ValueError(f"longctx::{self.name}: `causal` must be True; got False")


def get_policy(spec: str | Policy) -> Policy:
    """A policy from its name and options, e.g. `get_policy("flexprefill:gamma=0.9,block_size=64")`."""
    if isinstance(spec, Policy):
        return spec
    name, _, options = spec.partition(":")
    known = {cls.name: cls for cls in _policies(Policy)}
    if name not in known:
        raise ValueError(f"longctx::get_policy: `spec` must name one of {', '.join(sorted(known))}; got {name!r}")
    types = typing.get_type_hints(known[name])
    fields = {f.name: types[f.name] for f in dataclasses.fields(known[name])}
    arguments = {}
    for option in filter(None, options.split(",")):
        field, equals, text = (part.strip() for part in option.partition("="))
        if field not in fields or not equals:
            rule = f"set fields of {name} ({', '.join(fields) or 'it has none'}) as field=value"
            raise ValueError(f"longctx::get_policy: `spec` must {rule}; got {option!r}")
        arguments[field] = _parse(name, field, text, fields[field])
    required = {f.name for f in dataclasses.fields(known[name]) if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(arguments)):
        raise ValueError(f"longctx::get_policy: `spec` must set {', '.join(missing)} of {name}; got {spec!r}")
    return known[name](**arguments)


def _policies(cls: type[Policy]) -> list[type[Policy]]:
    """Every named policy, a user's own included; a leading underscore keeps a helper out of the list."""
    children = [leaf for child in cls.__subclasses__() for leaf in _policies(child)]
    public = not getattr(cls, "name", "_").startswith("_")
    return ([cls] if public else []) + children


def _parse(name: str, field: str, text: str, kind: Any) -> Any:
    choices = typing.get_args(kind) or (kind,)  # `int | None` accepts "none"
    if type(None) in choices and text.lower() == "none":
        return None
    for choice in choices:
        if choice is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if choice in (int, float, str):
            try:
                return choice(text)
            except ValueError:
                break
    wanted = " or ".join("none" if choice is type(None) else choice.__name__ for choice in choices)
    raise ValueError(f"longctx::get_policy: `{name}.{field}` must be {wanted}; got {text!r}")
