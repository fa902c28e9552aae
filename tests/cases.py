"""One entry an op: valid calls by argument name, and what is illegal about its arguments.

The tests that hold for every op (conventions, bad input, opcheck, compile) loop over `CASES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import longctx
import longctx.reference
import target
from longctx.testing import block_list

Call = dict[str, Any]
DTYPES = target.dtypes()
MERGED_DTYPES = target.dtypes(merge_states=True)
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Invalid:
    """A call that only `validate=True` rejects: `argument` takes `value`, and the error names it."""

    variant: str
    argument: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """What the shared tests know about one op."""

    name: str
    calls: Mapping[str, Callable[[torch.dtype], Call]]  # variant -> valid call
    illegal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # option -> values that raise
    extreme: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # option -> odd, legal values
    legal_changes: frozenset[str] = frozenset()  # of those that test_bad_input makes, "<variant>: <change>"
    invalid: Mapping[str, Invalid] = field(default_factory=dict)  # why -> call
    differentiable: tuple[str, ...] = ()  # arguments that take a gradient
    has_backward: bool = False  # else a gradient of `differentiable` raises
    growing: Mapping[str, int] = field(default_factory=dict)  # arguments of "plain" that may be longer along a dim
    any_strides: frozenset[str] = frozenset()  # arguments that need no contiguous last dim
    mutates: tuple[str, ...] = ()  # arguments that the op changes
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def public(self) -> Callable[..., Any]:
        return getattr(longctx, self.name)  # type: ignore[no-any-return]

    @property
    def op(self) -> Callable[..., Any]:
        """The op; where it changes arguments, on copies that it returns behind the outputs."""
        return self._on_copies(self.public)

    @property
    def twin(self) -> Callable[..., Any]:
        return self._on_copies(getattr(longctx.reference, self.name))

    def _on_copies(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.mutates:
            return function

        @functools.wraps(function)
        def on_copies(**call: Any) -> tuple[Any, ...]:
            copies = {name: call[name].clone() for name in self.mutates}
            return function(**(call | copies)), *copies.values()

        return on_copies


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 37,
    seqlen_k: int = 75,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    seed: int = 0,
) -> Call:
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    return {
        "q": randn(batch, num_q_heads, seqlen_q, head_dim, dtype=dtype, seed=seed),
        "k": randn(batch, num_kv_heads, seqlen_k, head_dim, dtype=dtype, seed=seed + 1),
        "v": randn(batch, num_kv_heads, seqlen_k, head_dim_v, dtype=dtype, seed=seed + 2),
    }


def random_ranges(batch: int, num_ranges: int, seqlen_q: int, seqlen_k: int, *, seed: int) -> Tensor:
    """`key_ranges` of which about half are reversed or empty."""
    shape = (batch, num_ranges, seqlen_q, 2)
    return torch.randint(0, seqlen_k + 1, shape, generator=generator(seed), dtype=torch.int32)


def random_blocks(
    call: Call,
    *,
    block_size_q: int,
    block_size_k: int,
    pattern_heads: int = 1,
    pattern_batch: int = 1,
    density: float = 0.4,
    seed: int = 0,
) -> Call:
    """`call` with a random block list over its axes: some rows empty, a tail of -1."""
    rows = -(-call["q"].shape[2] // block_size_q)
    columns = -(-call["k"].shape[2] // block_size_k)
    own = torch.ones(rows, columns, dtype=torch.bool)
    if "cu_seqlens_q" in call:
        # Each sequence owns the next rows; the bound on their number needs no lengths on the host.
        own = torch.zeros(rows + len(call["cu_seqlens_q"]) - 1, columns, dtype=torch.bool)
        row = 0
        for length_q, length_k in zip(
            call["cu_seqlens_q"].diff().tolist(), call["cu_seqlens_k"].diff().tolist(), strict=True
        ):
            own[row : row + -(-length_q // block_size_q), : -(-length_k // block_size_k)] = True
            row += -(-length_q // block_size_q)
    mask = own & (torch.rand(pattern_batch, pattern_heads, *own.shape, generator=generator(seed)) < density)
    mask[:, :, 1::5] = False
    block_indptr, block_indices = block_list(mask, spare=3)
    return call | {
        "block_indptr": block_indptr,
        "block_indices": block_indices,
        "block_size_q": block_size_q,
        "block_size_k": block_size_k,
    }


def plain(dtype: torch.dtype) -> Call:
    return qkv(dtype, head_dim_v=24)


def all_options(dtype: torch.dtype) -> Call:
    """A static cache under every part of the predicate at once."""
    return qkv(dtype, num_q_heads=6, num_kv_heads=3, head_dim_v=24, seed=3) | {
        "causal": True,
        "softmax_scale": 0.3,
        "window_size_left": 20,
        "window_size_right": 4,
        "num_sink_tokens": 2,
        "softcap": 3.0,
        "sinks": randn(6, seed=4),
        "key_ranges": random_ranges(2, 2, 37, 75, seed=5),
        "seqused_k": int32(75, 41),
    }


def packed(dtype: torch.dtype) -> Call:
    """Packed sequences, some without queries, without keys, or without both."""
    return qkv(dtype, batch=1, seqlen_q=50, seqlen_k=70, head_dim_v=24, seed=6) | {
        "cu_seqlens_q": int32(0, 0, 17, 22, 22, 45, 50),
        "cu_seqlens_k": int32(0, 4, 34, 37, 37, 70, 70),
    }


def with_blocks(call: Callable[[torch.dtype], Call], **blocks: Any) -> Callable[[torch.dtype], Call]:
    return lambda dtype: random_blocks(call(dtype), **blocks)


def states(dtype: torch.dtype) -> Call:
    lse = randn(3, 2, 4, 19, dtype=torch.promote_types(dtype, torch.float32), seed=8)
    lse[0, 0, :, ::4] = -torch.inf
    lse[:, 1, :, 5] = -torch.inf
    return {"out": randn(3, 2, 4, 19, 24, dtype=dtype, seed=7), "lse": lse}


def overridden_states(dtype: torch.dtype) -> Call:
    call = states(dtype)
    return call | {"lse_override": call["lse"].roll(1, dims=0)}


def mass(call: Callable[[torch.dtype], Call], **options: Any) -> Callable[[torch.dtype], Call]:
    """The call of `attention_mass` on what attention returns for `call`."""

    def build(dtype: torch.dtype) -> Call:
        arguments = call(dtype)
        _, lse = longctx.reference.attention(**arguments)
        del arguments["v"]
        return arguments | {"lse": lse} | options

    return build


def scored(call: Callable[[torch.dtype], Call], **options: Any) -> Callable[[torch.dtype], Call]:
    """The call of `block_scores` on the axes of `call`."""
    names = ("q", "k", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    return lambda dtype: {name: value for name, value in call(dtype).items() if name in names} | options


def block_map(*shape: int, **options: Any) -> Callable[[torch.dtype], Call]:
    return lambda dtype: {"scores": torch.softmax(randn(*shape, dtype=dtype, seed=9), dim=-1)} | options


def score_rows(*shape: int, **options: Any) -> Callable[[torch.dtype], Call]:
    """Rows of scores with ties and -inf."""

    def build(dtype: torch.dtype) -> Call:
        scores = (4 * randn(*shape, seed=70)).round() / 4
        scores[..., 3::17] = -torch.inf
        return {"scores": scores.to(dtype)} | options

    return build


def linear(
    dtype: torch.dtype,
    *,
    decay: tuple[int, ...],
    normalize: bool = False,
    num_states: int = 0,
    seed: int = 0,
    **sizes: Any,
) -> Call:
    """q, k, v with log decays of shape `decay`, among them 0 and -inf, and a state for each of `num_states`."""
    call = qkv(dtype, seed=seed, **sizes)
    if normalize:  # a sum of weights far from 0
        call |= {"q": call["q"].abs(), "k": call["k"].abs()}
    log_decay = -randn(*decay, seed=seed + 3).abs()
    log_decay.flatten()[::5] = 0.0
    log_decay.flatten()[3::7] = -torch.inf
    call |= {"log_decay": log_decay}
    if num_states:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (num_states, call["q"].shape[1], call["q"].shape[3], call["v"].shape[3] + normalize)
        call |= {"initial_state": randn(*shape, dtype=wide, seed=seed + 4).abs()}
    return call


def linear_plain(dtype: torch.dtype) -> Call:
    return linear(dtype, decay=(4,), seqlen_q=75, seqlen_k=75, head_dim_v=24)


def linear_all_options(dtype: torch.dtype) -> Call:
    sizes = {"num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 150, "seqlen_k": 150, "head_dim_v": 24}
    call = linear(dtype, decay=(2, 6, 150), normalize=True, num_states=2, seed=20, **sizes)
    return call | {"normalize": True, "scale": 0.3, "eps": 0.5, "num_segments": 2}


def linear_packed(dtype: torch.dtype) -> Call:
    """Packed sequences, some of them empty."""
    call = linear(dtype, decay=(1, 4, 150), batch=1, seqlen_q=150, seqlen_k=150, head_dim_v=24, seed=30)
    return call | {"cu_seqlens": int32(0, 0, 17, 22, 22, 145, 150)}


def linear_cross(dtype: torch.dtype) -> Call:
    return linear(dtype, decay=(4,), num_states=2, seqlen_q=101, seqlen_k=75, head_dim_v=24, seed=40) | {
        "causal": False
    }


def linear_reversed(dtype: torch.dtype) -> Call:
    sizes = {"num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 150, "seqlen_k": 150, "head_dim_v": 24}
    call = linear(dtype, decay=(2, 6, 150), num_states=2, seed=70, **sizes)
    rows_first = {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    return call | rows_first | {"scale": 0.3, "num_segments": 2, "reverse": True, "wide_out": True}


def without(call: Callable[[torch.dtype], Call], *names: str) -> Callable[[torch.dtype], Call]:
    return lambda dtype: {name: value for name, value in call(dtype).items() if name not in names}


def decode_plain(dtype: torch.dtype) -> Call:
    call = linear(dtype, decay=(4,), num_states=2, seqlen_q=3, seqlen_k=3, head_dim_v=24, seed=50)
    return call | {"state": call.pop("initial_state")}


def decode_all_options(dtype: torch.dtype) -> Call:
    sizes = {"batch": 3, "num_q_heads": 6, "num_kv_heads": 3, "seqlen_q": 4, "seqlen_k": 4, "head_dim_v": 24}
    call = linear(dtype, decay=(3, 6, 4), normalize=True, num_states=5, seed=60, **sizes)
    options = {"normalize": True, "scale": 0.3, "eps": 0.5}
    slots = {"state_indices": int32(4, -1, 1), "commit": int32(1, 2, 0)}
    return call | {"state": call.pop("initial_state")} | options | slots


def random_indices(*shape: int, num_blocks: int, seed: int) -> Tensor:
    """int32 `shape`: in each row different blocks in any order, some of them -1."""
    order = torch.rand(*shape[:-1], num_blocks, generator=generator(seed)).argsort(dim=-1)
    indices = torch.nn.functional.pad(order, (0, max(0, shape[-1] - num_blocks)), value=-1)[..., : shape[-1]]
    return indices.masked_fill(torch.rand(shape, generator=generator(seed + 1)) < 0.1, -1).int()


def gathered(dtype: torch.dtype, *, index_heads: int = 2, num_entries: int = 20, block_size_k: int = 1,
             seed: int = 0, **sizes: int) -> Call:  # fmt: skip
    call = qkv(dtype, **({"seqlen_q": 3, "seed": seed} | sizes))
    batch, _, seqlen_q, _ = call["q"].shape
    blocks = -(-call["k"].shape[2] // block_size_k)
    indices = random_indices(batch, index_heads, seqlen_q, num_entries, num_blocks=blocks, seed=seed + 7)
    return call | {"indices": indices} | ({"block_size_k": block_size_k} if block_size_k > 1 else {})


def gathered_paged(dtype: torch.dtype) -> Call:
    """7 of 15 pages of 16 keys, in any order, no two batch entries the same; a bias, of some entries -inf."""
    call = gathered(dtype, num_q_heads=6, num_kv_heads=3, index_heads=6, num_entries=40, head_dim_v=24, seed=80)
    pages = qkv(dtype, batch=15, num_kv_heads=3, seqlen_k=16, head_dim_v=24, seed=81)
    bias = randn(2, 6, 3, 40, seed=82)
    bias[..., ::9] = -torch.inf
    return call | {
        "k": pages["k"],
        "v": pages["v"],
        "bias": bias,
        "seqused_k": int32(75, 110),
        "page_table": torch.randperm(15, generator=generator(83))[:14].view(2, 7).int(),
        "num_last": 4,
    }


def gathered_all_options(dtype: torch.dtype) -> Call:
    """A static cache of which blocks of 4 keys are read, and every token its own number of them."""
    sizes = {"num_q_heads": 6, "num_kv_heads": 3, "head_dim_v": 24}
    call = gathered(dtype, index_heads=3, num_entries=13, block_size_k=4, seed=70, **sizes)
    return call | {
        "counts": torch.randint(0, 14, (2, 3, 3), generator=generator(71), dtype=torch.int32),
        "num_first": 3,
        "num_last": 5,
        "softmax_scale": 0.3,
        "softcap": 3.0,
        "seqused_k": int32(75, 41),
    }


ILLEGAL_OPTIONS = {
    "softmax_scale": (float("nan"), float("inf")),
    "window_size_left": (-2, -INT64_MAX),
    "window_size_right": (-2, -INT64_MAX),
    "num_sink_tokens": (-1, -INT64_MAX),
    "softcap": (float("nan"), float("inf"), -1.0),
}
ILLEGAL_BLOCK_SIZES = {
    "block_size_q": (0, -16, 1, 8, 24, 256, 2**31, INT64_MAX),
    "block_size_k": (0, -16, 2, 24, 256, 2**31, INT64_MAX),
}
EXTREME_OPTIONS = {
    "softmax_scale": (0.0, -1.0),
    "window_size_left": (INT32_MAX, INT64_MAX),
    "window_size_right": (INT32_MAX, INT64_MAX),
    "num_sink_tokens": (INT32_MAX, INT64_MAX),
    "softcap": (1e30,),
}
INVALID_SEQUENCES = {
    "seqused_k past the keys": Invalid("all_options", "seqused_k", int32(75, 76)),
    "seqused_k negative": Invalid("all_options", "seqused_k", int32(-1, 75)),
    "cu_seqlens_q falls": Invalid("packed", "cu_seqlens_q", int32(0, 17, 0, 22, 22, 45, 50)),
    "cu_seqlens_q past the rows": Invalid("packed", "cu_seqlens_q", int32(0, 0, 17, 22, 22, 45, 51)),
    "cu_seqlens_q ends early": Invalid("packed", "cu_seqlens_q", int32(0, 0, 17, 22, 22, 45, 49)),
    "cu_seqlens_k negative": Invalid("packed", "cu_seqlens_k", int32(-1, 4, 34, 37, 37, 70, 70)),
    "cu_seqlens_k falls": Invalid("packed", "cu_seqlens_k", int32(0, 4, 34, 30, 37, 70, 70)),
    "key_ranges negative": Invalid("all_options", "key_ranges", torch.full((2, 2, 37, 2), -1).int() + int32(0, 3)),
    "key_ranges past the keys": Invalid("all_options", "key_ranges", torch.full((2, 1, 37, 2), 75).int() + int32(0, 1)),
}
BLOCKS_ALL_OPTIONS = with_blocks(all_options, block_size_q=16, block_size_k=8, pattern_heads=3, pattern_batch=2)


def selected(argument: str, index: tuple[int, ...], value: int) -> Invalid:
    """The all_options call of gather_attention with one element of `argument` replaced."""
    call = gathered_all_options(torch.float32)
    tensor = call[argument].clone()
    tensor[index] = value
    return Invalid("all_options", argument, tensor)


def edited(argument: str, index: tuple[int, ...], value: int) -> Invalid:
    """The block list of the all_options call with one element of `argument` replaced."""
    tensor = BLOCKS_ALL_OPTIONS(torch.float32)[argument].clone()
    tensor[index] = value
    return Invalid("all_options", argument, tensor)


INVALID_BLOCKS = {
    "block_indices not ascending": edited("block_indices", (0,), 9),
    "block_indices negative": edited("block_indices", (0,), -1),
    "block_indices past the keys": edited("block_indices", (0,), 10),
    "block_indices twice": edited("block_indices", (1,), int(BLOCKS_ALL_OPTIONS(torch.float32)["block_indices"][0])),
    "block_indptr falls": edited("block_indptr", (0, 0, 1), 10_000),
    "block_indptr negative": edited("block_indptr", (0, 0, 0), -1),
    "block_indptr past the capacity": edited("block_indptr", (1, 2, 3), 10_000),
}

LINEAR_OPTIONS = {"scale": (float("nan"), float("inf")), "eps": (float("nan"), float("inf"), -1.0)}
INVALID_DECAYS = {
    "log_decay positive": Invalid("plain", "log_decay", torch.tensor([0.0, -1.0, 1e-6, -1.0])),
    "log_decay NaN": Invalid("plain", "log_decay", torch.tensor([0.0, -1.0, float("nan"), -1.0])),
}
INVALID_LINEAR_SEQUENCES = {
    "cu_seqlens falls": Invalid("packed", "cu_seqlens", int32(0, 17, 0, 22, 22, 145, 150)),
    "cu_seqlens negative": Invalid("packed", "cu_seqlens", int32(-1, 0, 17, 22, 22, 145, 150)),
    "cu_seqlens past the rows": Invalid("packed", "cu_seqlens", int32(0, 0, 17, 22, 22, 145, 151)),
    "cu_seqlens ends early": Invalid("packed", "cu_seqlens", int32(0, 0, 17, 22, 22, 145, 149)),
}

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_CHANGES = frozenset(
    f"{variant}: scores{change}"
    for variant, dim in (("all_options", 3), ("one_row", 0))
    for change in (f".size({dim})+1", f".size({dim})=0", " of dtype torch.bfloat16", " with one more dim")
) - {"all_options: scores with one more dim"} | {"one_row: scores on another device"}
INVALID_LENGTHS = {
    "lengths past the scores": Invalid("all_options", "lengths", int32(*[51] * 24).view(2, 3, 4)),
    "lengths negative": Invalid("all_options", "lengths", int32(*[-1] * 24).view(2, 3, 4)),
}

CASES = {
    case.name: case
    for case in (
        OpCase(
            name="merge_states",
            calls={"plain": states, "override": overridden_states},
            legal_changes=frozenset(
                f"{variant}: {change}"
                for variant in ("plain", "override")
                for change in ("out.size(4)+1", "out.size(4)=0", "out of dtype torch.bfloat16")
            ),
            growing={"out": 3, "lse": 3},
            differentiable=("out", "lse"),
            any_strides=frozenset({"out", "lse", "lse_override"}),
            dtypes=MERGED_DTYPES,
        ),
        OpCase(
            name="attention",
            calls={"plain": plain, "all_options": all_options, "packed": packed},
            illegal=ILLEGAL_OPTIONS,
            extreme=EXTREME_OPTIONS,
            legal_changes=frozenset(
                {"all_options: v.size(3)+1", "packed: v.size(3)+1", "packed: q.size(2)+1", "packed: q.size(2)=0"}
            ),
            growing={"q": 2, "k": 2, "v": 2},
            invalid=INVALID_SEQUENCES,
            differentiable=("q", "k", "v"),
        ),
        OpCase(
            name="block_sparse_attention",
            calls={
                "plain": with_blocks(plain, block_size_q=16, block_size_k=32, density=0.8),
                "all_options": BLOCKS_ALL_OPTIONS,
                "packed": with_blocks(packed, block_size_q=16, block_size_k=8, pattern_heads=4),
            },
            illegal=ILLEGAL_OPTIONS | ILLEGAL_BLOCK_SIZES,
            extreme=EXTREME_OPTIONS,
            legal_changes=frozenset(
                f"{variant}: {change}"
                for variant in ("all_options", "packed")
                for change in ("v.size(3)+1", "block_indices.size(0)+1", "block_indices.size(0)=0")
            )
            | {"packed: q.size(2)+1"},
            growing={"k": 2, "v": 2},
            invalid=INVALID_SEQUENCES | INVALID_BLOCKS,
            differentiable=("q", "k", "v"),
        ),
        OpCase(
            name="gather_attention",
            calls={"plain": gathered, "all_options": gathered_all_options, "paged": gathered_paged},
            illegal={name: ILLEGAL_OPTIONS[name] for name in ("softmax_scale", "softcap")}
            | {
                "block_size_k": (0, -16, 2**31, INT64_MAX),
                "num_first": (-1, -INT64_MAX),
                "num_last": (-1, -INT64_MAX),
            },
            extreme={name: EXTREME_OPTIONS[name] for name in ("softmax_scale", "softcap")}
            | {
                "block_size_k": (1, 7, 2**20),
                "num_first": (INT32_MAX, INT64_MAX),
                "num_last": (INT32_MAX, INT64_MAX),
            },
            legal_changes=frozenset(
                {"paged: v.size(3)+1", "paged: page_table.size(1)+1", "paged: page_table.size(1)=0"}
                | {f"all_options: {change}" for change in ("v.size(3)+1", "indices.size(3)+1", "indices.size(3)=0")}
            ),
            growing={"k": 2, "v": 2, "indices": 3},
            invalid={why: INVALID_SEQUENCES[why] for why in ("seqused_k past the keys", "seqused_k negative")}
            | {
                "indices past the keys": selected("indices", (0, 0, 0, 0), 19),
                "indices below -1": selected("indices", (0, 0, 0, 0), -2),
                "indices twice": Invalid("all_options", "indices", torch.full((2, 3, 3, 13), 7, dtype=torch.int32)),
                "page_table past the pages": Invalid("paged", "page_table", torch.full((2, 7), 15).int()),
                "page_table negative": Invalid("paged", "page_table", torch.full((2, 7), -1).int()),
                "counts negative": selected("counts", (0, 0, 0), -1),
                "counts past the entries": selected("counts", (0, 0, 0), 14),
            },
            differentiable=("q", "k", "v"),
            any_strides=frozenset({"counts"}),
        ),
        OpCase(
            name="attention_mass",
            calls={
                "plain": mass(plain, reduce="both"),
                "all_options": mass(all_options, segment_offsets=int32(0, 9, 9, 50, 75)),
                "packed": mass(packed, reduce="diagonal"),
            },
            illegal=ILLEGAL_OPTIONS | {"reduce": ("row", "")},
            extreme=EXTREME_OPTIONS,
            legal_changes=frozenset(
                {"all_options: segment_offsets.size(0)+1"}
                | {f"{variant}: k.size(2){change}" for variant in ("all_options", "packed") for change in ("+1", "=0")}
            ),
            growing={"q": 2, "k": 2, "lse": 2},
            invalid=INVALID_SEQUENCES
            | {
                "segment_offsets fall": Invalid("all_options", "segment_offsets", int32(0, 9, 8, 75)),
                "segment_offsets past the keys": Invalid("all_options", "segment_offsets", int32(0, 9, 76)),
                "segment_offsets negative": Invalid("all_options", "segment_offsets", int32(-1, 9, 75)),
            },
            differentiable=("q", "k", "lse"),
            any_strides=frozenset({"lse"}),
        ),
        OpCase(
            name="block_scores",
            calls={
                "plain": scored(plain, block_size_q=16, block_size_k=8),
                "all_options": scored(all_options, block_size_q=32, block_size_k=16, method="max_mean", softmax=False),
                "packed": scored(packed, block_size_q=16, block_size_k=8, method="antidiagonal", stride=8),
            },
            illegal=ILLEGAL_BLOCK_SIZES
            | {
                "method": ("sum", ""),
                "softmax_scale": (float("nan"), float("inf")),
                "q_offset": (INT64_MAX, -INT64_MAX),
            },
            extreme={"q_offset": (2**39, -(2**39)), "softmax_scale": (0.0, -1.0)},
            legal_changes=frozenset(
                f"{variant}: {change}"
                for variant in ("all_options", "packed")
                for change in ("q.size(2)+1", "q.size(2)=0", "k.size(2)+1", "k.size(2)=0")
            ),
            growing={"q": 2, "k": 2},
            invalid={why: case for why, case in INVALID_SEQUENCES.items() if case.argument != "key_ranges"},
            differentiable=("q", "k"),
        ),
        OpCase(
            name="select_blocks",
            calls={
                "plain": block_map(2, 3, 7, 9, method="top_k", value=3),
                "all_options": block_map(
                    2,
                    3,
                    5,
                    19,
                    method="cumulative",
                    value=torch.tensor([0.3, 0.7, 1.0]),
                    scope="head",
                    num_first=1,
                    num_local=2,
                    block_size_q=16,
                    block_size_k=8,
                    q_offset=-80,
                    max_blocks_per_row=6,
                    seqused_k=int32(150, 77),
                ),
                "packed": block_map(
                    1,
                    4,
                    10,
                    9,
                    method="relative",
                    value=0.5,
                    block_size_q=16,
                    block_size_k=8,
                    cu_seqlens_q=packed(torch.float32)["cu_seqlens_q"],
                    cu_seqlens_k=packed(torch.float32)["cu_seqlens_k"],
                ),
            },
            illegal=ILLEGAL_BLOCK_SIZES
            | {
                "method": ("best", ""),
                "scope": ("map", ""),
                "value": (float("nan"),),
                "num_first": (-1, -INT64_MAX),
                "num_local": (-1, -INT64_MAX),
                "max_blocks_per_row": (0, 2, -INT64_MAX),
                "q_offset": (INT64_MAX, -INT64_MAX),
            },
            extreme={
                "q_offset": (2**39, -(2**39)),
                "value": (0.0, 1e30, -1e30, float("inf"), -float("inf")),
                "max_blocks_per_row": (INT32_MAX, INT64_MAX, None),
            },
            legal_changes=frozenset(
                f"{variant}: scores.size({dim}){change}"
                for variant, dims in (("all_options", (2, 3)), ("packed", (1, 2, 3)))
                for dim in dims
                for change in ("+1", "=0")
            )
            | {
                f"all_options: value of dtype {dtype}"
                for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool)
            },
            growing={"scores": 2},
            invalid={
                "seqused_k past the keys": Invalid("all_options", "seqused_k", int32(150, 153)),
                "seqused_k negative": Invalid("all_options", "seqused_k", int32(-1, 77)),
                "cu_seqlens_q falls": Invalid("packed", "cu_seqlens_q", int32(0, 17, 0, 22, 22, 45, 50)),
                "cu_seqlens_k negative": Invalid("packed", "cu_seqlens_k", int32(-1, 4, 34, 37, 37, 70, 70)),
            },
            any_strides=frozenset({"value"}),
            dtypes=(torch.float32,),
        ),
        OpCase(
            name="topk_select",
            calls={
                "plain": score_rows(2, 3, 5, 40, k=7),
                "all_options": score_rows(
                    2,
                    3,
                    4,
                    50,
                    k=9,
                    lengths=int32(*(2 * (0, 1, 3, 5, 6, 9, 10, 33, 40, 48, 49, 50))).view(2, 3, 4),
                    num_first=2,
                    num_last=3,
                ),
                "one_row": score_rows(300, k=20, num_last=4),
            },
            illegal={
                "k": (-1, 4, 2**31, INT64_MAX, -INT64_MAX),
                "num_first": (-1, -INT64_MAX),
                "num_last": (-1, -INT64_MAX),
            },
            extreme={"k": (5, 50, 1000), "num_first": (0, 6), "num_last": (0, 7)},
            legal_changes=ROW_CHANGES,
            growing={"scores": 3},
            invalid=INVALID_LENGTHS,
            any_strides=frozenset({"lengths"}),
            dtypes=SCORE_DTYPES,
        ),
        OpCase(
            name="threshold_select",
            calls={
                "plain": score_rows(2, 3, 5, 40, value=0.5, max_k=12),
                "all_options": score_rows(
                    2,
                    3,
                    4,
                    50,
                    value=0.6,
                    method="cumulative",
                    max_k=11,
                    lengths=int32(*(2 * (0, 1, 3, 5, 6, 9, 10, 33, 40, 48, 49, 50))).view(2, 3, 4),
                    num_first=1,
                    num_last=2,
                ),
                "one_row": score_rows(300, value=-0.5, max_k=20, num_last=4),
            },
            illegal={
                "value": (float("nan"),),
                "method": ("top_k", ""),
                "max_k": (-1, 2, 2**31, INT64_MAX, -INT64_MAX),
                "num_first": (-1, -INT64_MAX),
                "num_last": (-1, -INT64_MAX),
            },
            extreme={
                "value": (0.0, 1.0, -1e30, 1e30, float("inf"), -float("inf")),
                "max_k": (3, 50, 1000),
                "num_first": (0, 9),
                "num_last": (0, 10),
            },
            legal_changes=ROW_CHANGES,
            growing={"scores": 3},
            invalid=INVALID_LENGTHS,
            any_strides=frozenset({"lengths"}),
            dtypes=SCORE_DTYPES,
        ),
        OpCase(
            name="linear_attention",
            calls={
                "plain": linear_plain,
                "all_options": linear_all_options,
                "packed": linear_packed,
                "cross": linear_cross,
                "reversed": linear_reversed,
            },
            illegal=LINEAR_OPTIONS | {"num_segments": (-1, -INT64_MAX)},
            extreme={"scale": (0.0, -1.0), "eps": (0.0, 1e30), "num_segments": (INT32_MAX, INT64_MAX)},
            legal_changes=frozenset(
                {"packed: v.size(3)+1", "packed: cu_seqlens.size(0)+1", "cross: q.size(2)+1", "cross: q.size(2)=0"}
            ),
            growing={"q": 2, "k": 2, "v": 2},
            invalid=INVALID_DECAYS | INVALID_LINEAR_SEQUENCES,
            differentiable=("q", "k", "v", "log_decay", "initial_state"),
            has_backward=True,
            any_strides=frozenset({"log_decay", "initial_state"}),
        ),
        OpCase(
            name="linear_attention_states",
            calls={
                "plain": without(linear_plain, "q"),
                "all_options": without(linear_all_options, "q", "scale", "eps", "num_segments"),
                "packed": without(linear_packed, "q"),
                "reversed": without(linear_reversed, "q", "scale", "num_segments", "wide_out"),
            },
            legal_changes=frozenset({"packed: k.size(3)+1", "packed: v.size(3)+1", "packed: cu_seqlens.size(0)+1"}),
            growing={"k": 2, "v": 2},
            invalid=INVALID_DECAYS | INVALID_LINEAR_SEQUENCES,
            differentiable=("k", "v", "log_decay"),
            any_strides=frozenset({"log_decay", "initial_state"}),
        ),
        OpCase(
            name="linear_attention_decode",
            calls={"plain": decode_plain, "all_options": decode_all_options},
            illegal=LINEAR_OPTIONS,
            extreme={"scale": (0.0, -1.0), "eps": (0.0, 1e30)},
            legal_changes=frozenset(
                f"all_options: state{change}" for change in (".size(0)+1", ".size(0)=0", " huge in its first dim")
            ),
            growing={"q": 2, "k": 2, "v": 2},
            invalid=INVALID_DECAYS
            | {
                "state_indices past the slots": Invalid("all_options", "state_indices", int32(5, -1, 1)),
                "state_indices below -1": Invalid("all_options", "state_indices", int32(4, -2, 1)),
                "state_indices twice": Invalid("all_options", "state_indices", int32(4, -1, 4)),
                "commit negative": Invalid("all_options", "commit", int32(-1, 2, 0)),
                "commit past the tokens": Invalid("all_options", "commit", int32(1, 5, 0)),
            },
            any_strides=frozenset({"log_decay"}),
            mutates=("state",),
        ),
    )
}
