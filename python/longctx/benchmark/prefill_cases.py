"""The measured cases of sparse prefill."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import longctx
from longctx import reference
from longctx.benchmark.case import BF16, BLOCK, FP16, FP32, Case, Contenders, attention_work, partial, qkv
from longctx.testing import force_isa


def _dense(length: int, dtype: torch.dtype, *, dim: int, isa: str | None = None) -> Contenders:
    q, k, v = qkv(length, dtype, 8, 8, dim)

    def ours() -> object:
        if isa is None:
            return longctx.attention(q, k, v)
        with force_isa(isa):
            return longctx.attention(q, k, v)

    flops, nbytes = attention_work(q, k, length * (length + 1) / 2)
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
    q, k, v = qkv(length, dtype, 8, kv_heads, dim)
    indptr, indices, rows = random_block_list(kv_heads, length // BLOCK, density)
    if kv_heads != q.shape[1]:
        rows = [head for head in rows for _ in range(q.shape[1] // kv_heads)]
    visited = sum(len(row) - 0.5 for head in rows for row in head) * BLOCK * BLOCK / len(rows)
    flops, nbytes = attention_work(q, k, visited)
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


def _merge(length: int, dtype: torch.dtype) -> Contenders:
    out = torch.randn(4, 1, 8, length, 128).to(dtype)
    lse = torch.randn(4, 1, 8, length)

    def torch_merge() -> Tensor:
        weights = torch.softmax(lse, dim=0).unsqueeze(-1)
        return torch.sum(weights * out, dim=0).to(dtype)

    run = {"longctx": lambda: longctx.merge_states(out, lse), "torch": torch_merge}
    return Contenders(run, 2.0 * out.numel(), out.nbytes * 1.25)


def _naive(length: int, dtype: torch.dtype) -> Contenders:
    q, k, v = qkv(length, dtype, 8, 8, 128)
    flops, nbytes = attention_work(q, k, length * (length + 1) / 2)
    run = {
        "longctx": lambda: longctx.attention(q, k, v),
        "reference": lambda: reference.attention(q, k, v),
    }
    return Contenders(run, flops, nbytes)


def _causal_blocks(num_blocks: int) -> Tensor:
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril()


def _block_scores(length: int, dtype: torch.dtype, *, method: str) -> Contenders:
    q, k, _ = qkv(length, dtype, 8, 2, 128)
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


def _attention_mass(length: int, dtype: torch.dtype) -> Contenders:
    """What the last block of queries looks at: the estimate behind FlexPrefill and MInference."""
    q, k, v = qkv(length, dtype, 8, 2, 128)
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


SPARSE = "10% of blocks of 128, D=128"

CASES = [
    Case("dense causal, D=128", "attention", 8192, BF16, partial(_dense, dim=128), {"sdpa": (1.8, 3.0)}),
    Case("dense causal, D=64", "attention", 8192, BF16, partial(_dense, dim=64), {"sdpa": (2.0, 3.5)}),
    Case("dense causal, D=128", "attention", 4096, FP32, partial(_dense, dim=128), {"sdpa": (1.2, 1.8)}),
    Case("dense causal, D=128", "attention", 4096, FP16, partial(_dense, dim=128), {"sdpa": (1.5, 3.0)}),
    Case(
        "dense causal, D=128, AVX2 forced",
        "attention",
        4096,
        FP32,
        partial(_dense, dim=128, isa="avx2"),
        {"sdpa": (0.6, 1.0)},
    ),
    Case("dense causal, D=128", "attention", 1024, FP32, _naive),
    Case(
        SPARSE,
        "block_sparse_attention",
        8192,
        BF16,
        partial(_sparse, kv_heads=8, density=0.1, masked=True),
        {"flex": (1.8, 3.0)},
    ),
    Case(
        SPARSE,
        "block_sparse_attention",
        8192,
        BF16,
        partial(_sparse, kv_heads=8, density=0.1, masked=False),
        {"sdpa": (6.0, 15.0)},
    ),
    Case(
        SPARSE + ", GQA 8/2",
        "block_sparse_attention",
        8192,
        BF16,
        partial(_sparse, kv_heads=2, density=0.1, masked=False),
        {"sdpa": (8.0, 20.0)},
    ),
    Case("4 states, 8 heads, D=128", "merge_states", 8192, BF16, _merge),
    Case("means, GQA 8/2, D=128", "block_scores", 32768, BF16, partial(_block_scores, method="mean")),
    Case(
        "antidiagonals of 16, GQA 8/2, D=128",
        "block_scores",
        16384,
        BF16,
        partial(_block_scores, method="antidiagonal"),
    ),
    Case("top 10%, 8 heads", "select_blocks", 65536, FP32, _select_blocks),
    Case("last 128 queries by key, GQA 8/2, D=128", "attention_mass", 32768, BF16, _attention_mass),
]
