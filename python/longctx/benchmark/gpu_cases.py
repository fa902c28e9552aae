"""What is measured on a GPU: inputs, contenders on the same inputs, and the work that has to be done.

Every attention case is checked at its full length: some rows of every contender against their float32 formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import longctx
from longctx.benchmark import gpu_gather, gpu_kv, gpu_linear, gpu_topk, peers
from longctx.benchmark.gpu_work import CHECKED_ROWS, GpuCase, Inputs, Run, Work, gpu_case, randn
from longctx.testing import block_list, force_cuda_path

BLOCK = 128
Path = Literal["auto", "sm80", "sm90"]  # of attention, `longctx.testing.force_cuda_path`


def qkv(
    device: str,
    *,
    batch: int = 1,
    heads: int = 32,
    kv_heads: int = 32,
    seqlen_q: int,
    seqlen_k: int | None = None,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    return {
        "q": randn(batch, heads, seqlen_q, dim, device=device, seed=0, dtype=dtype),
        "k": randn(batch, kv_heads, seqlen_k, dim, device=device, seed=1, dtype=dtype),
        "v": randn(batch, kv_heads, seqlen_k, dim, device=device, seed=2, dtype=dtype),
    }


def attention_work(inputs: Inputs, pairs: float) -> tuple[float, float]:
    """FLOPs and bytes when every query head scores `pairs` (query, key) pairs in every batch entry."""
    q, k = inputs["q"], inputs["k"]
    return 4.0 * q.shape[0] * q.shape[1] * q.shape[3] * pairs, 2.0 * (q.nbytes + k.nbytes)


def exact_rows(inputs: Inputs, rows: Tensor, tiles: Tensor | None, block: int) -> Tensor:
    """Attention of some query rows by its formula in float32: [batch, heads, len(rows), dim].

    `tiles` bool [heads of the pattern, num_q_blocks, num_k_blocks]; causal, the last query at the last key.
    """
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    batch, heads, seqlen_q, dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    keys = torch.arange(seqlen_k, device=q.device)
    visible = (keys <= rows[:, None] + seqlen_k - seqlen_q).expand(heads, -1, -1)
    if tiles is not None:
        listed = tiles[:, rows // BLOCK].repeat_interleave(block, dim=-1)[..., :seqlen_k]
        visible = visible & listed.repeat_interleave(heads // tiles.shape[0], dim=0)
    out = torch.empty(batch, heads, len(rows), dim, device=q.device)
    for head in range(heads):  # one at a time: float32 copies of all keys would not fit beside the inputs
        k_head, v_head = (x[:, head // (heads // kv_heads)].float() for x in (k, v))
        scores = dim**-0.5 * q[:, head, rows].float() @ k_head.mT
        weights = torch.softmax(scores.masked_fill(~visible[head], -torch.inf), -1).nan_to_num()
        out[:, head] = weights @ v_head
    return out


def row_check(inputs: Inputs, *, dense: tuple[str, ...] = (), tiles: Tensor | None = None, block: int = BLOCK) -> Any:
    """Compares rows of an output [batch, heads, seqlen, dim] with the formula; contenders in `dense` ignore `tiles`."""
    seqlen_q = inputs["q"].shape[2]
    rows = torch.linspace(0, seqlen_q - 1, min(CHECKED_ROWS, seqlen_q), device=inputs["q"].device).long()
    tolerance = 1e-4 if inputs["q"].dtype == torch.float32 else 2e-2

    @functools.cache
    def expected(is_dense: bool) -> Tensor:
        return exact_rows(inputs, rows, None if is_dense else tiles, block)

    def check(name: str, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(
            out[:, :, rows].float(), expected(tiles is None or name in dense), atol=tolerance, rtol=tolerance
        )

    return check


def ours(inputs: Inputs, path: Path = "auto") -> Tensor:
    with force_cuda_path(path):
        return longctx.attention(inputs["q"], inputs["k"], inputs["v"])[0]


def ours_sparse(inputs: Inputs, path: Path = "auto") -> Tensor:
    lists = (inputs["block_indptr"], inputs["block_indices"], BLOCK, inputs["block_size_k"])
    with force_cuda_path(path):
        return longctx.block_sparse_attention(inputs["q"], inputs["k"], inputs["v"], *lists)[0]


def dense(length: int, device: str, *, sm80: bool = False, **shape: Any) -> Work:
    inputs = qkv(device, seqlen_q=length, **shape)
    contenders: dict[str, Run] = {"longctx": ours, **peers.dense(inputs)}
    if sm80:
        contenders["longctx sm_80 path"] = functools.partial(ours, path="sm80")
    return Work(inputs, contenders, *attention_work(inputs, length * (length + 1) / 2), row_check(inputs))


def random_tiles(heads: int, num_blocks: int, columns_per_block: int, density: float, device: str) -> Tensor:
    """bool [heads, num_blocks, columns]: every row keeps its diagonal and the share `density` of what it sees."""
    columns = num_blocks * columns_per_block
    row = torch.arange(num_blocks, device=device)[:, None]
    column = torch.arange(columns, device=device)
    visible = column < (row + 1) * columns_per_block
    draw = randn(heads, num_blocks, columns, device=device, seed=3, dtype=torch.float32)
    draw = draw.masked_fill(~visible, -torch.inf).masked_fill(column // columns_per_block == row, torch.inf)
    kept = (density * (row + 1) * columns_per_block).round().long().clamp(min=columns_per_block)
    order = draw.argsort(dim=-1, descending=True)
    return torch.zeros_like(draw, dtype=torch.bool).scatter(-1, order, (column < kept).expand_as(draw)) & visible


def sparse(
    length: int,
    device: str,
    *,
    density: float,
    kv_heads: int = 32,
    block_size_k: int = BLOCK,
    flex: bool = False,
    sm80: bool = False,
    dim: int = 128,
) -> Work:
    inputs = qkv(device, seqlen_q=length, kv_heads=kv_heads, dim=dim)
    tiles = random_tiles(kv_heads, length // BLOCK, BLOCK // block_size_k, density, device)
    inputs["block_indptr"], inputs["block_indices"] = block_list(tiles[None])
    inputs["block_size_k"] = block_size_k
    contenders: dict[str, Run] = {"longctx": ours_sparse, "longctx dense": ours}
    if sm80:
        contenders["longctx sm_80 path"] = functools.partial(ours_sparse, path="sm80")
    dense_peers = peers.sdpa(inputs)
    contenders |= dense_peers
    if flex:
        contenders["flex"] = peers.flex(inputs, tiles)
    # Of a tile on the diagonal half the scores count.
    pairs = float(tiles.sum()) / kv_heads * BLOCK * block_size_k - length * BLOCK / 2
    check = row_check(inputs, dense=("longctx dense", *dense_peers), tiles=tiles, block=block_size_k)
    return Work(inputs, contenders, *attention_work(inputs, pairs), check)


def decode(length: int, device: str, *, batch: int, kv_heads: int) -> Work:
    inputs = qkv(device, batch=batch, kv_heads=kv_heads, seqlen_q=1, seqlen_k=length)
    contenders: dict[str, Run] = {"longctx": ours, **peers.decode(inputs)}
    return Work(inputs, contenders, *attention_work(inputs, length), row_check(inputs))


def merge(length: int, device: str) -> Work:
    out = randn(4, 1, 32, length, 128, device=device, seed=0)
    lse = randn(4, 1, 32, length, device=device, seed=1, dtype=torch.float32)

    def formula(inputs: Inputs) -> Tensor:
        merged: Tensor = (torch.softmax(inputs["lse"], 0)[..., None] * inputs["out"]).sum(0)
        return merged

    def check(name: str, output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(result.float(), formula(inputs).float(), atol=2e-2, rtol=2e-2)

    inputs = {"out": out, "lse": lse}
    contenders: dict[str, Run] = {"longctx": lambda i: longctx.merge_states(i["out"], i["lse"]), "torch": formula}
    return Work(inputs, contenders, 2.0 * out.numel(), out.nbytes * 1.25 + lse.nbytes * 1.25, check)


def scores(length: int, device: str, *, method: Literal["mean", "antidiagonal"], stride: int = 16) -> Work:
    inputs = qkv(device, seqlen_q=length, kv_heads=8)
    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.block_scores(i["q"], i["k"], BLOCK, BLOCK, method=method, stride=stride),
        "longctx dense": ours,
    }
    flops = length * length / 2 * 32 * 128 * 2 / (stride if method == "antidiagonal" else BLOCK * BLOCK)
    return Work(inputs, contenders, flops, float(inputs["q"].nbytes + inputs["k"].nbytes))


def selection(length: int, device: str) -> Work:
    blocks = length // BLOCK
    inputs = {"scores": torch.softmax(randn(1, 32, blocks, blocks, device=device, seed=0, dtype=torch.float32), -1)}
    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.select_blocks(i["scores"], method="cumulative", value=0.9),
        "torch.sort of the map": lambda i: i["scores"].sort(dim=-1, descending=True),
    }
    return Work(inputs, contenders, 0.0, float(inputs["scores"].nbytes))


def mass(length: int, device: str) -> Work:
    inputs = qkv(device, seqlen_q=BLOCK, seqlen_k=length, kv_heads=8)
    _, inputs["lse"] = longctx.attention(inputs["q"], inputs["k"], inputs["v"])
    contenders: dict[str, Run] = {
        "longctx": lambda i: longctx.attention_mass(i["q"], i["k"], i["lse"], reduce="both"),
        "longctx attention of the same rows": ours,
    }
    flops, _ = attention_work(inputs, BLOCK * length)
    return Work(inputs, contenders, flops / 2, float(inputs["q"].nbytes + inputs["k"].nbytes))


def policy_work(inputs: Inputs, spec: str, length: int) -> Work:
    """A policy end to end and its selection alone, beside dense attention."""
    policy, context = longctx.get_policy(spec), longctx.AttentionContext()
    contenders: dict[str, Run] = {
        "longctx": lambda i: policy.attend(i["q"], i["k"], i["v"], context),
        "selection": lambda i: policy.select(i["q"], i["k"], context),
        "longctx dense": ours,
        **peers.sdpa(inputs),
    }
    density = float(policy.select(inputs["q"], inputs["k"], context).density())
    return Work(inputs, contenders, *attention_work(inputs, density * length * (length + 1) / 2))


def policy_on_noise(length: int, device: str, *, spec: str) -> Work:
    return policy_work(qkv(device, seqlen_q=length, kv_heads=8), spec, length)


def policy_on_prompt(length: int, device: str, *, spec: str) -> Work:
    """On q, k and v of the demo's constructed model (second layer), asked about a needle in real text."""
    from longctx.benchmark.prompt import captured_qkv

    return policy_work(captured_qkv(length, device), spec, length)


def case(title: str, op: str, length: int, make: Callable[..., Work], **options: Any) -> GpuCase:
    return gpu_case(title, op, length, make, 512 if make is not policy_on_prompt else 2048, **options)


K = 1024
FLEXPREFILL = "FlexPrefill, the demo's prompt, 32/8 heads"
DENSE_16K = "dense causal bf16 D=128, 32 heads"
SPARSE = "density {:g}, blocks of 128, 32 heads, D=128"
HEADLINE: list[GpuCase] = [
    case(DENSE_16K, "attention", 16 * K, dense, sm80=True),
    case(SPARSE.format(0.1), "block_sparse_attention", 64 * K, sparse, density=0.1, flex=True, sm80=True),
    case(SPARSE.format(1), "block_sparse_attention", 16 * K, sparse, density=1.0),
    case(FLEXPREFILL, "policy", 128 * K, policy_on_prompt, spec="flexprefill"),
    case(FLEXPREFILL, "policy", 32 * K, policy_on_prompt, spec="flexprefill"),
]
OTHERS: list[GpuCase] = [
    *(
        case(f"dense causal bf16 D={dim}, 32 heads", "attention", length, dense, dim=dim, sm80=True)
        for dim in (128, 64, 256)
        for length in (64 * K, 16 * K, 4 * K)
        if (dim, length) != (128, 16 * K)
    ),
    *(
        case(SPARSE.format(density), "block_sparse_attention", length, sparse, density=density)
        for length in (64 * K, 16 * K, 128 * K)
        for density in (0.05, 0.1, 0.2, 0.5, 1.0)
        if (length, density) not in ((64 * K, 0.1), (16 * K, 1.0))
    ),
    case("dense causal bf16 D=128, heads 32/8", "attention", 16 * K, dense, kv_heads=8),
    case("density 0.1, heads 32/8", "block_sparse_attention", 64 * K, sparse, density=0.1, kv_heads=8),
    *(
        case(f"density 0.1, keys in blocks of {size}", "block_sparse_attention", 16 * K, sparse,
             density=0.1, kv_heads=8, block_size_k=size)
        for size in (64, 16, 8, 1)
    ),
    case("dense causal fp16 D=128, 32 heads", "attention", 16 * K, dense, dtype=torch.float16),
    case("dense causal fp32 D=128, 8 heads", "attention", 4 * K, dense, dtype=torch.float32, heads=8, kv_heads=8),
    *(
        case(f"one query, batch {batch}, heads 32/8", "attention", length, decode, batch=batch, kv_heads=8)
        for batch, length in ((1, 32 * K), (1, 128 * K), (16, 32 * K))
    ),
    case("4 states, 32 heads, D=128", "merge_states", 8 * K, merge),
    *(case("means, heads 32/8", "block_scores", length, scores, method="mean") for length in (32 * K, 128 * K)),
    case("antidiagonals of 16, heads 32/8", "block_scores", 32 * K, scores, method="antidiagonal"),
    *(case("the fewest that hold 0.9, 32 heads", "select_blocks", length, selection) for length in (32 * K, 128 * K)),
    *(case("last 128 queries, heads 32/8", "attention_mass", length, mass) for length in (32 * K, 128 * K)),
    case("FlexPrefill, noise, 32/8 heads", "policy", 32 * K, policy_on_noise, spec="flexprefill"),
    case("XAttention, noise, 32/8 heads", "policy", 32 * K, policy_on_noise, spec="xattention"),
]  # fmt: skip
CASES = [
    *(HEADLINE + gpu_linear.HEADLINE + gpu_topk.HEADLINE + gpu_gather.CASES),
    *(OTHERS + gpu_linear.OTHERS + gpu_topk.OTHERS + gpu_kv.CASES),
]
