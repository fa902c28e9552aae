"""What is measured: per op, its inputs, what one would use instead, and the work it has to do."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import longctx
from longctx import reference
from longctx.testing import force_isa

BLOCK = 128


@dataclass(frozen=True)
class Contenders:
    """Callables on the same inputs; the first one is ours."""

    run: Mapping[str, Callable[[], object]]
    flops: float  # of the visited (query, key) pairs, not of the dense square
    bytes: float  # each input read once, each output written once
    exact: Callable[[], object] | None = None  # the naive twin, where the peers compute something else


@dataclass(frozen=True)
class Case:
    """One line of the table. `goals` maps a contender to (minimum, goal) for peer time / our time."""

    name: str
    op: str
    length: int
    dtype: torch.dtype
    make: Callable[[int, torch.dtype], Contenders]
    goals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def contenders(self, length: int | None = None) -> Contenders:
        return self.make(length or self.length, self.dtype)

    def check(self) -> None:
        """Compares our output with every peer's (or the twin's) at a short length; raises on a difference."""
        contenders = self.contenders(min(self.length, 4 * BLOCK))
        run = contenders.run
        if contenders.exact is not None:
            run = {"longctx": run["longctx"], "the naive twin": contenders.exact}
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        outputs = {name: _first(fn()).float() for name, fn in run.items()}
        ours, *peers = outputs
        for peer in peers:
            try:
                torch.testing.assert_close(outputs[ours], outputs[peer], atol=tolerance, rtol=tolerance)
            except AssertionError as error:
                raise AssertionError(f"{self.name}: longctx differs from {peer}: {error}") from None


def _first(result: object) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]


def _qkv(length: int, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, h, length, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))


def _attention_work(q: Tensor, k: Tensor, pairs: float) -> tuple[float, float]:
    """FLOPs and bytes when every query head scores `pairs` (query, key) pairs."""
    heads, dim = q.shape[1], q.shape[3]
    return 4.0 * heads * dim * pairs, float(2 * (q.nbytes + k.nbytes))


def _dense(length: int, dtype: torch.dtype, *, dim: int, isa: str | None = None) -> Contenders:
    q, k, v = _qkv(length, dtype, 8, 8, dim)

    def ours() -> object:
        if isa is None:
            return longctx.attention(q, k, v)
        with force_isa(isa):
            return longctx.attention(q, k, v)

    flops, nbytes = _attention_work(q, k, length * (length + 1) / 2)
    sdpa = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    return Contenders({"longctx": ours, "sdpa": sdpa}, flops, nbytes)


def random_block_list(
    heads: int, num_blocks: int, density: float, seed: int = 0
) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """A causal list in which every row keeps its diagonal block and `density` of its visible blocks."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[list[int]]] = []
    for _ in range(heads):
        rows.append([])
        for i in range(num_blocks):
            kept = max(0, round(density * (i + 1)) - 1)
            rows[-1].append([*sorted(torch.randperm(i, generator=generator)[:kept].tolist()), i])
    counts = torch.tensor([[len(row) for row in head] for head in rows])
    ends = counts.flatten().cumsum(0).view_as(counts)
    indptr = torch.cat([(ends - counts)[:, :1], ends], dim=1)[None]
    indices = torch.tensor([block for head in rows for row in head for block in row], dtype=torch.int32)
    return indptr, indices, rows


def _flex(q: Tensor, k: Tensor, v: Tensor, rows: list[list[list[int]]]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask

    heads, blocks = len(rows), len(rows[0])
    full_counts = torch.zeros(1, heads, blocks, dtype=torch.int32)
    full_indices = torch.zeros(1, heads, blocks, blocks, dtype=torch.int32)
    diagonal_indices = torch.zeros(1, heads, blocks, blocks, dtype=torch.int32)
    for h, head in enumerate(rows):
        for i, row in enumerate(head):
            full_counts[0, h, i] = len(row) - 1
            full_indices[0, h, i, : len(row) - 1] = torch.tensor(row[:-1], dtype=torch.int32)
            diagonal_indices[0, h, i, 0] = i
    block_mask = BlockMask.from_kv_blocks(
        torch.ones_like(full_counts),
        diagonal_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    )
    return functools.partial(_compiled_flex(), q, k, v, block_mask=block_mask)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _sparse(length: int, dtype: torch.dtype, *, kv_heads: int, density: float, masked: bool) -> Contenders:
    dim = 128
    q, k, v = _qkv(length, dtype, 8, kv_heads, dim)
    indptr, indices, rows = random_block_list(kv_heads, length // BLOCK, density)
    if kv_heads != q.shape[1]:
        rows = [head for head in rows for _ in range(q.shape[1] // kv_heads)]
    visited = sum(len(row) - 0.5 for head in rows for row in head) * BLOCK * BLOCK / len(rows)
    flops, nbytes = _attention_work(q, k, visited)
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.block_sparse_attention(q, k, v, indptr, indices, BLOCK, BLOCK)
    }
    if masked:  # the same pattern: comparable in output
        run["flex"] = _flex(q, k, v, rows)
        return Contenders(run, flops, nbytes)
    # Dense attention: what one would run without the pattern. It gives another result, so ours is
    # checked against the twin.
    run["sdpa"] = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    twin = functools.partial(reference.block_sparse_attention, q, k, v, indptr, indices, BLOCK, BLOCK)
    return Contenders(run, flops, nbytes, exact=twin)


def _decode(length: int, dtype: torch.dtype, *, kv_heads: int) -> Contenders:
    """One query token that sees every key."""
    q, k, v = _qkv(length, dtype, 8, kv_heads, 128)
    q = q[:, :, -1:].contiguous()
    flops, nbytes = _attention_work(q, k, length)
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.attention(q, k, v),
        "sdpa": functools.partial(scaled_dot_product_attention, q, k, v, enable_gqa=kv_heads != 8),
    }
    return Contenders(run, flops, nbytes)


def _gather(length: int, dtype: torch.dtype) -> Contenders:
    """2048 keys anywhere among `length`; every turn takes other keys, so that none are in the cache."""
    kv_heads, turns, kept = 2, 24, min(2048, length)
    q = torch.randn(1, 8, 1, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    k, v = (torch.empty(1, kv_heads, length, 128, dtype=dtype).normal_() for _ in range(2))
    order = torch.rand(turns, kv_heads, length, generator=torch.Generator().manual_seed(1))
    chosen = order.topk(kept, dim=-1).indices.sort(dim=-1).values
    entries = chosen.int()[:, None, :, None]
    next_turn = {"longctx": 0, "index_select": turns // 2}

    def turn(name: str) -> int:
        if kept == length:  # the check compares one result
            return 0
        next_turn[name] += 1
        return next_turn[name] % turns

    def select(rows: Tensor, keys: Tensor) -> Tensor:
        return torch.stack([rows[0, h].index_select(0, keys[h]) for h in range(kv_heads)])[None]

    def torch_gather() -> Tensor:
        keys = chosen[turn("index_select")]
        return scaled_dot_product_attention(q, select(k, keys), select(v, keys), enable_gqa=True)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.gather_attention(q, k, v, entries[turn("longctx")]),
        "index_select + sdpa": torch_gather,
    }
    return Contenders(run, 4.0 * 8 * 128 * kept, kept * kv_heads * 2.0 * 128 * dtype.itemsize)


def _merge(length: int, dtype: torch.dtype) -> Contenders:
    out = torch.randn(4, 1, 8, length, 128).to(dtype)
    lse = torch.randn(4, 1, 8, length)

    def torch_merge() -> Tensor:
        weights = torch.softmax(lse, dim=0).unsqueeze(-1)
        return torch.sum(weights * out, dim=0).to(dtype)

    run = {"longctx": lambda: longctx.merge_states(out, lse), "torch": torch_merge}
    return Contenders(run, 2.0 * out.numel(), out.nbytes * 1.25)


def _naive(length: int, dtype: torch.dtype) -> Contenders:
    q, k, v = _qkv(length, dtype, 8, 8, 128)
    flops, nbytes = _attention_work(q, k, length * (length + 1) / 2)
    run = {
        "longctx": lambda: longctx.attention(q, k, v),
        "reference": lambda: reference.attention(q, k, v),
    }
    return Contenders(run, flops, nbytes)


def _causal_blocks(num_blocks: int) -> Tensor:
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril()


def _block_scores(length: int, dtype: torch.dtype, *, method: str) -> Contenders:
    q, k, _ = _qkv(length, dtype, 8, 2, 128)
    stride, blocks, scale = 16, length // BLOCK, 128**-0.5

    def torch_mean() -> Tensor:
        q_means = q.unflatten(2, (blocks, BLOCK)).mean(3, dtype=torch.float32)
        k_means = k.unflatten(2, (blocks, BLOCK)).mean(3, dtype=torch.float32).repeat_interleave(4, dim=1)
        logits = scale * (q_means @ k_means.transpose(2, 3))
        return torch.softmax(logits.masked_fill(~_causal_blocks(blocks), -torch.inf), dim=-1)

    def torch_antidiagonal() -> Tensor:
        q_squares = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
        k_squares = k.unflatten(2, (-1, stride)).flatten(3).repeat_interleave(4, dim=1)
        logits = (q_squares @ k_squares.transpose(2, 3)).float() * (scale / stride)
        weights = torch.softmax(logits.masked_fill(~_causal_blocks(length // stride), -torch.inf), dim=-1)
        return torch.mean(weights.unflatten(3, (blocks, -1)).sum(-1).unflatten(2, (blocks, -1)), dim=3)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.block_scores(q, k, BLOCK, BLOCK, method=method, stride=stride),  # type: ignore[arg-type]
        "torch": torch_mean if method == "mean" else torch_antidiagonal,
    }
    flops = 8 * 128 * (blocks**2 if method == "mean" else length**2 / stride)
    return Contenders(run, flops, q.nbytes + k.nbytes)


def _select_blocks(length: int, dtype: torch.dtype) -> Contenders:
    """The best 10% of a row's blocks plus the diagonal, as a CSR list."""
    blocks = length // BLOCK
    scores = torch.rand(1, 8, blocks, blocks, generator=torch.Generator().manual_seed(0))
    kept = max(1, blocks // 10)

    def torch_top_k() -> tuple[Tensor, Tensor]:
        visible = _causal_blocks(blocks)
        masked = scores.masked_fill(~visible.tril(-1), -torch.inf)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(3, masked.topk(kept, dim=-1).indices, True)
        chosen = (chosen | torch.eye(blocks, dtype=torch.bool)) & visible
        counts = chosen.sum(-1)
        ends = counts.flatten().cumsum(0).view_as(counts)
        return torch.cat([(ends - counts)[..., :1], ends], -1), chosen.nonzero()[:, -1].int()

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.select_blocks(scores, method="top_k", value=kept, num_local=1),
        "torch": torch_top_k,
    }
    return Contenders(run, 0.0, scores.nbytes)


def _score_rows(length: int, dtype: torch.dtype, rows: str) -> Tensor:
    scores = torch.randn(8, length, generator=torch.Generator().manual_seed(0))
    made = {
        "random": lambda: scores,
        "ascending": lambda: scores.sort(dim=-1).values,
        "descending": lambda: scores.sort(dim=-1, descending=True).values,
        "constant": lambda: torch.ones_like(scores),
        "16 values": lambda: (4 * scores).round().clamp(-8, 7),
    }[rows]()
    return made.to(dtype)


def _topk_select(length: int, dtype: torch.dtype, *, rows: str) -> Contenders:
    """The twin sorts each row; torch.topk breaks ties as it likes."""
    scores = _score_rows(length, dtype, rows)
    k = min(2048, length // 4)
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.topk_select(scores, k),
        "torch.topk": lambda: torch.topk(scores, k),
    }
    return Contenders(run, 0.0, scores.nbytes, exact=functools.partial(reference.topk_select, scores, k))


def _threshold_select(length: int, dtype: torch.dtype, *, method: str) -> Contenders:
    """At most 4096 of each row: those above 2.5, or those that hold half of the softmax."""
    scores = _score_rows(length, dtype, "random")
    scores = scores if method == "threshold" else 4 * scores
    value, max_k = (2.5, 4096) if method == "threshold" else (0.5, 4096)

    def torch_threshold() -> Tensor:
        return (scores >= value).nonzero()

    def torch_cumulative() -> tuple[Tensor, Tensor]:
        weights, order = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        return order, (weights.cumsum(-1) - weights < value).sum(-1)

    options = {"value": value, "method": method, "max_k": max_k}
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.threshold_select(scores, **options),  # type: ignore[arg-type]
        "torch": torch_threshold if method == "threshold" else torch_cumulative,
    }
    twin = functools.partial(reference.threshold_select, scores, **options)  # type: ignore[arg-type]
    return Contenders(run, 0.0, scores.nbytes, exact=twin)


def _attention_mass(length: int, dtype: torch.dtype) -> Contenders:
    """What the last block of queries looks at: the estimate behind FlexPrefill and MInference."""
    q, k, v = _qkv(length, dtype, 8, 2, 128)
    q = q[:, :, -BLOCK:]
    _, lse = longctx.attention(q, k, v)

    def torch_mass() -> Tensor:
        scores = (q.unflatten(1, (2, 4)) @ k.unsqueeze(2).transpose(3, 4)).float().flatten(1, 2) * 128**-0.5
        visible = torch.ones(BLOCK, length, dtype=torch.bool).tril(length - BLOCK)
        return torch.sum(torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~visible, 0.0), dim=2)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.attention_mass(q, k, lse, reduce="key"),
        "torch": torch_mass,
    }
    return Contenders(run, 2.0 * 8 * 128 * BLOCK * length, k.nbytes)


def chunked_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = 128
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Linear attention by matmuls, `chunk` tokens at a time: the best of PyTorch on a CPU (measured for 64 to 256).

    What depends on the decays alone is made before.
    """
    position = torch.arange(chunk, dtype=torch.float64, device=q.device)
    decay = log_decay.double()[:, None]
    distance = position[:, None] - position
    pairs = torch.exp(decay[..., None] * distance.clamp(min=0.0)).masked_fill(distance < 0, 0.0).to(q.dtype)
    rows = torch.exp(decay * (position + 1)).to(q.dtype)[..., None]
    keys = torch.exp(decay * (chunk - 1 - position)).to(q.dtype)[..., None]
    carry = torch.exp(decay * chunk).float()[..., None]

    def run() -> tuple[Tensor, Tensor]:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], device=q.device)
        out = []
        for q_rows, k_rows, v_rows in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
            within = ((q_rows @ k_rows.transpose(2, 3)) * pairs) @ v_rows
            out.append(within + (q_rows * rows) @ state.to(q.dtype))
            state = carry * state + ((k_rows * keys).transpose(2, 3) @ v_rows).float()
        return torch.cat(out, dim=2), state

    return run


def _linear(length: int, dtype: torch.dtype) -> Contenders:
    q, k, v = _qkv(length, dtype, 8, 8, 128)
    k = 0.1 * 128**-0.5 * k  # outputs near 1: they are compared by absolute error
    log_decay = -(2.0 ** -torch.arange(1.0, 9.0))
    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention(q, k, v, log_decay),
        "torch chunks": chunked_linear_attention(q, k, v, log_decay),
        "sdpa": functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True),
    }
    twin = functools.partial(reference.linear_attention, q, k, v, log_decay)
    return Contenders(run, 8.0 * length * 128 * (2 * 64 + 4 * 128), 4.0 * q.nbytes, exact=twin)


def _linear_gradients(length: int, dtype: torch.dtype) -> Contenders:
    """Forward and backward under a fixed decay."""
    q, k, v = _qkv(length, dtype, 8, 8, 128)
    k = 0.1 * 128**-0.5 * k
    inputs = [x.requires_grad_() for x in (q, k, v)]
    log_decay = -(2.0 ** -torch.arange(1.0, 9.0))
    dout = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():  # contenders are timed without
                return torch.autograd.grad(forward()[0], inputs, dout)

        return run

    run: dict[str, Callable[[], object]] = {
        "longctx": gradients(functools.partial(longctx.linear_attention, q, k, v, log_decay)),
        "torch chunks": gradients(chunked_linear_attention(q, k, v, log_decay)),
    }
    twin = gradients(functools.partial(reference.linear_attention, q, k, v, log_decay))
    return Contenders(run, 4 * 8.0 * length * 128 * (2 * 64 + 4 * 128), 4 * 4.0 * q.nbytes, exact=twin)


def _linear_beside_sdpa(length: int, dtype: torch.dtype) -> Contenders:
    """Short lengths: where linear attention overtakes the quadratic one."""
    contenders = _linear(length, dtype)
    run = {name: contenders.run[name] for name in ("longctx", "sdpa")}
    return replace(contenders, run=run)


def _linear_beside_itself(length: int, dtype: torch.dtype, *, short: int) -> Contenders:
    """The same number of tokens in calls of `short`: the speed-up is tokens/s at `length` over tokens/s at `short`."""
    q, k, v = _qkv(length, dtype, 8, 8, 128)
    k.mul_(0.1 * 128**-0.5)
    log_decay = -(2.0 ** -torch.arange(1.0, 9.0))
    first_q, first_k, first_v = (x[:, :, :short] for x in (q, k, v))

    def short_calls() -> None:
        for _ in range(length // short):
            longctx.linear_attention(first_q, first_k, first_v, log_decay)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention(q, k, v, log_decay),
        f"itself, {short} tokens": short_calls,
    }
    twin = functools.partial(reference.linear_attention, q, k, v, log_decay)
    return Contenders(run, 8.0 * length * 128 * (2 * 64 + 4 * 128), 4.0 * q.nbytes, exact=twin)


def _linear_states(length: int, dtype: torch.dtype) -> Contenders:
    _, k, v = _qkv(length, dtype, 8, 8, 128)

    def torch_states() -> Tensor:
        chunks = k.unflatten(2, (-1, 64)).transpose(3, 4) @ v.unflatten(2, (-1, 64))
        return torch.cumsum(chunks.float(), dim=2)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention_states(k, v),
        "torch": torch_states,
    }
    twin = functools.partial(reference.linear_attention_states, k, v)
    return Contenders(run, 8.0 * length * 2 * 128 * 128, 2.0 * k.nbytes + length / 64 * 8 * 65536, exact=twin)


def _linear_decode(length: int, dtype: torch.dtype) -> Contenders:
    """One token of one sequence with 64 heads; a state has no length."""
    q, k, v = _qkv(1, dtype, 64, 64, 128)
    log_decay = torch.linspace(-1.0, 0.0, 64)
    state, torch_state = torch.zeros(2, 1, 64, 128, 128).unbind(0)
    decay = log_decay.exp()[:, None, None]

    def torch_decode() -> Tensor:
        torch_state.mul_(decay).add_(k.float().transpose(2, 3) @ v.float())
        return (q.float() @ torch_state).to(dtype)

    run: dict[str, Callable[[], object]] = {
        "longctx": lambda: longctx.linear_attention_decode(q, k, v, log_decay, state),
        "torch": torch_decode,
    }
    return Contenders(run, 64 * 5.0 * 128 * 128, 2.0 * state.nbytes)


def _minimax(length: int, dtype: torch.dtype) -> Contenders:
    from longctx.benchmark.minimax import contenders

    return contenders(length, dtype)


def _partial(make: Callable[..., Contenders], **options: object) -> Callable[..., Contenders]:
    return functools.partial(make, **options)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SPARSE = "10% of blocks of 128, D=128"

CASES = [
    Case("dense causal, D=128", "attention", 8192, BF16, _partial(_dense, dim=128), {"sdpa": (1.8, 3.0)}),
    Case("dense causal, D=64", "attention", 8192, BF16, _partial(_dense, dim=64), {"sdpa": (2.0, 3.5)}),
    Case("dense causal, D=128", "attention", 4096, FP32, _partial(_dense, dim=128), {"sdpa": (1.2, 1.8)}),
    Case("dense causal, D=128", "attention", 4096, FP16, _partial(_dense, dim=128), {"sdpa": (1.5, 3.0)}),
    Case(
        "dense causal, D=128, AVX2 forced",
        "attention",
        4096,
        FP32,
        _partial(_dense, dim=128, isa="avx2"),
        {"sdpa": (0.6, 1.0)},
    ),
    Case("dense causal, D=128", "attention", 1024, FP32, _naive),
    Case(
        SPARSE,
        "block_sparse_attention",
        8192,
        BF16,
        _partial(_sparse, kv_heads=8, density=0.1, masked=True),
        {"flex": (1.8, 3.0)},
    ),
    Case(
        SPARSE,
        "block_sparse_attention",
        8192,
        BF16,
        _partial(_sparse, kv_heads=8, density=0.1, masked=False),
        {"sdpa": (6.0, 15.0)},
    ),
    Case(
        SPARSE + ", GQA 8/2",
        "block_sparse_attention",
        8192,
        BF16,
        _partial(_sparse, kv_heads=2, density=0.1, masked=False),
        {"sdpa": (8.0, 20.0)},
    ),
    Case("decoding, GQA 8/2, D=128", "attention", 131072, BF16, _partial(_decode, kv_heads=2), {"sdpa": (2.3, 3.5)}),
    Case("decoding, 8/8, D=128", "attention", 131072, BF16, _partial(_decode, kv_heads=8), {"sdpa": (0.95, 1.2)}),
    Case(
        "2048 keys of all, GQA 8/2, D=128",
        "gather_attention",
        1 << 20,
        BF16,
        _gather,
        {"index_select + sdpa": (1.5, 2.5)},
    ),
    Case("4 states, 8 heads, D=128", "merge_states", 8192, BF16, _merge),
    Case("means, GQA 8/2, D=128", "block_scores", 32768, BF16, _partial(_block_scores, method="mean")),
    Case(
        "antidiagonals of 16, GQA 8/2, D=128",
        "block_scores",
        16384,
        BF16,
        _partial(_block_scores, method="antidiagonal"),
    ),
    Case("top 10%, 8 heads", "select_blocks", 65536, FP32, _select_blocks),
    *(
        Case(
            f"2048, 8 rows, {rows}",
            "topk_select",
            length,
            FP32,
            _partial(_topk_select, rows=rows),
            {"torch.topk": goal},
        )
        for length, random_goal in ((1 << 20, (5.0, 9.0)), (1 << 17, (5.0, 8.0)))
        for rows, goal in (
            ("random", random_goal),
            ("ascending", (2.0, 5.0)),
            ("descending", (2.0, 5.0)),
            ("constant", (2.0, 5.0)),
            ("16 values", (2.0, 5.0)),
        )
    ),
    Case("2048, 8 rows, random", "topk_select", 1 << 20, BF16, _partial(_topk_select, rows="random")),
    Case("above 2.5, 8 rows", "threshold_select", 1 << 17, FP32, _partial(_threshold_select, method="threshold")),
    Case(
        "half of the softmax, 8 rows",
        "threshold_select",
        1 << 17,
        FP32,
        _partial(_threshold_select, method="cumulative"),
    ),
    Case("last 128 queries by key, GQA 8/2, D=128", "attention_mass", 32768, BF16, _attention_mass),
    Case("8 heads, D=128", "linear_attention", 16384, BF16, _linear, {"torch chunks": (6.0, 14.0)}),
    Case("8 heads, D=128", "linear_attention", 16384, FP32, _linear, {"torch chunks": (2.5, 4.5)}),
    # The crossover with SDPA: at most 1024 tokens, the goal is 400.
    Case("8 heads, D=128", "linear_attention", 256, BF16, _linear_beside_sdpa),
    Case("8 heads, D=128", "linear_attention", 400, BF16, _linear_beside_sdpa, {"sdpa": (0.0, 1.0)}),
    Case("8 heads, D=128", "linear_attention", 512, BF16, _linear_beside_sdpa),
    Case("8 heads, D=128", "linear_attention", 1024, BF16, _linear_beside_sdpa, {"sdpa": (1.0, 1.0)}),
    Case(
        "8 heads, D=128, speed kept at length",
        "linear_attention",
        262144,
        BF16,
        _partial(_linear_beside_itself, short=4096),
        {"itself, 4096 tokens": (0.9, 1.0)},
    ),
    Case(
        "forward + backward, 8 heads, D=128",
        "linear_attention",
        16384,
        BF16,
        _linear_gradients,
        {"torch chunks": (5.0, 12.0)},
    ),
    Case("forward + backward, 8 heads, D=128", "linear_attention", 16384, FP32, _linear_gradients),
    Case("8 heads, D=128", "linear_attention_states", 16384, BF16, _linear_states),
    Case("64 heads, D=128", "linear_attention_decode", 1, BF16, _linear_decode, {"torch": (3.0, 8.0)}),
    Case("64 heads, D=128", "linear_attention_decode", 1, FP32, _linear_decode, {"torch": (3.0, 8.0)}),
]
if importlib.util.find_spec("transformers") is not None:
    goal = {"transformers": (4.0, 10.0)}
    name = "MiniMax lightning layer without projections, 16 heads, D=128"
    CASES += [Case(name, "linear_attention", 8192, dtype, _minimax, goal) for dtype in (BF16, FP32)]
