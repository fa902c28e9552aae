"""What is particular to the CUDA kernels: their limits here, and what only a GPU can show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch

import longctx
import target
from cases import CASES
from checks import as_tuple, assert_same_bits, assert_same_result, check_attention
from longctx.prefill import AttentionContext, LMInfinite
from longctx.testing import force_cuda_path, force_isa
from op_case import Call, OpCase, qkv, randn
from policy_cases import CALLS, POLICIES, rope
from prefill_cases import random_blocks
from topk_cases import SCORE_DTYPES

on_cuda_kernels = pytest.mark.runs_on("cuda", "simt", reason="about the CUDA kernels: --device cuda or --simt")


def supported(*cases: OpCase) -> list[OpCase]:
    return [case for case in cases if case.name in target.ops]


@on_cuda_kernels
def test_kmeans_takes_what_the_others_take() -> None:
    for keys, rule in (
        (
            randn(1, 1, 4, 8, dtype=torch.float64, seed=0),
            "have dtype float32, bfloat16 or float16 on CUDA; got float64",
        ),
        (randn(1, 1, 4, 300, seed=0), "have a head_dim of at most 256 on CUDA; got 300"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"longctx::kmeans: `keys` must {rule}")):
            longctx.kmeans(keys, 2)


@on_cuda_kernels
@pytest.mark.parametrize(
    "case", supported(*(case for case in CASES.values() if "q" in case.differentiable)), ids=lambda case: case.name
)
def test_float64_raises(case: OpCase) -> None:
    rule = f"longctx::{case.name}: `q` must have dtype float32, bfloat16 or float16 on CUDA; got float64"
    for make in case.calls.values():
        with pytest.raises(ValueError, match=re.escape(rule)):
            case.op(**make(torch.float64))


@on_cuda_kernels
@pytest.mark.parametrize("name", [case.name for case in supported(*CASES.values()) if "q" in case.differentiable])
def test_large_head_dim_raises(name: str) -> None:
    call = qkv(torch.float32, seqlen_q=75, seqlen_k=75, head_dim=300, head_dim_v=16)
    if name == "block_sparse_attention":
        call = random_blocks(call, block_size_q=16, block_size_k=16)
    if name == "gather_attention":
        call["indices"] = torch.zeros(2, 1, 1, 3, dtype=torch.int32)
    if name in ("attention_mass", "block_scores", "page_scores", "token_scores"):
        del call["v"]
    if name == "page_scores":
        call |= {"summary": call.pop("k"), "method": "dot"}
    if name == "attention_mass":
        call["lse"] = torch.zeros(call["q"].shape[:3])
    rule = f"longctx::{name}: `q` must have a head_dim of at most 256 on CUDA; got 300"
    with pytest.raises(ValueError, match=re.escape(rule)):
        CASES[name].op(**call)
    if "v" in call:
        rule = f"longctx::{name}: `v` must have a head_dim_v of at most 256 on CUDA; got 300"
        narrow = {"q": call["q"][..., :16], "k": call["k"][..., :16], "v": call["k"]}
        with pytest.raises(ValueError, match=re.escape(rule)):
            CASES[name].op(**(call | narrow))


# ---- what only a GPU can show ----

on_gpu = pytest.mark.runs_on("cuda", reason="needs a GPU: --device cuda")
for_every_op = pytest.mark.parametrize("case", supported(*CASES.values()), ids=lambda case: case.name)


@contextmanager
def no_sync() -> Iterator[None]:
    """Any wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cuda_calls(case: OpCase) -> Iterator[Call]:
    for make in case.calls.values():
        for dtype in case.dtypes:
            yield target.native(make(dtype))


@on_gpu
@for_every_op
def test_ops_never_wait(case: OpCase) -> None:
    for call in cuda_calls(case):
        case.op(**call)  # the first call may allocate
        with no_sync():
            case.op(**call)


@on_gpu
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", [*POLICIES, "lminfinite"])
def test_policies_on_gpu_tensors(name: str, kind: str) -> None:
    """The same result as on the CPU, without a wait: all tensors on the GPU, kernels of the CPU beside them."""
    case, policy = CALLS[kind], POLICIES.get(name, LMInfinite(num_global_tokens=5, window_size=40))
    call = target.native({"q": case.q, "k": case.k, "v": case.v})
    context = AttentionContext(layer_idx=1, rope=rope, **target.native(case.options))
    policy.attend(**call, context=context)
    with no_sync():
        pattern = policy.select(call["q"], call["k"], context)
        out, lse = policy.attend(**call, context=context)
        density = pattern.density()
    with target.cpu_kernels():
        here = AttentionContext(layer_idx=1, rope=rope, **case.options)
        expected_pattern = policy.select(case.q, case.k, here)
        expected = policy.attend(case.q, case.k, case.v, here)
    assert float(density) == pytest.approx(float(expected_pattern.density()), abs=0.02)
    if torch.equal(pattern.to_mask().cpu(), expected_pattern.to_mask()):  # rounding may move a block at the cut
        torch.testing.assert_close((out.cpu(), lse.cpu()), expected, rtol=1e-4, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("name", ["select_blocks", "threshold_select", "topk_select"])
def test_indices_are_those_of_the_cpu(name: str) -> None:
    """Of identical scores, on the kernels of both devices."""
    case = CASES[name]
    for make in case.calls.values():
        for dtype in case.dtypes:
            assert_same_on_both(case.op, make(dtype))


def assert_same_on_both(op: Callable[..., object], call: Call) -> None:
    actual = as_tuple(op(**target.native(call)))
    with target.cpu_kernels():
        expected = as_tuple(op(**call))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@on_gpu
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_clusters_are_those_of_the_cpu(dtype: torch.dtype, metric: str) -> None:
    """To the bit, where it multiplies and adds in one step: float32 products and float64 sums have one order."""
    with force_isa("avx2"):
        for n, dim, num_clusters in ((20_000, 128, 1000), (3000, 200, 40)):
            keys = randn(1, 2, n, dim, dtype=dtype, seed=n)
            assert_same_on_both(longctx.kmeans, {"keys": keys, "num_clusters": num_clusters, "metric": metric})


@on_gpu
@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "few values", "constant"])
def test_selections_of_long_rows_are_those_of_the_cpu(kind: str, dtype: torch.dtype) -> None:
    """One block of threads a row, and up to 128."""
    for rows, n in ((300, 20_001), (8, 131_072), (1, 1_500_000)):
        scores = 3 * randn(rows, n, seed=n)
        scores = {"random": scores, "few values": scores.round(), "constant": torch.ones(rows, n)}[kind].to(dtype)
        forced = {"num_first": 5, "num_last": 3000}
        assert_same_on_both(longctx.topk_select, {"scores": scores, "k": 8192, **forced})
        for method, value in (("threshold", 4.0), ("cumulative", 0.7)):
            rule = {"scores": scores, "method": method, "value": value, "max_k": n // 2, **forced}
            assert_same_on_both(longctx.threshold_select, rule)


@on_gpu
def test_rows_of_scores_beyond_32_bits() -> None:
    far = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 3 * far * 2:
        pytest.skip("less than 12 GiB of GPU memory are free")
    buffer = torch.empty(far + 70_000, dtype=torch.bfloat16, device="cuda")
    for n in (5000, 70_000):
        rows = buffer.as_strided((2, n), (far, 1))
        rows.copy_(randn(2, n, seed=n))
        assert_same_bits(longctx.topk_select(rows, 50), longctx.topk_select(rows.contiguous(), 50))


@on_gpu
@for_every_op
def test_graph_is_replayed_on_new_inputs(case: OpCase) -> None:
    for call in cuda_calls(case):
        case.op(**call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = as_tuple(case.op(**call))
        # Other values of the same kind: the rows in reverse.
        for value in call.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 2:
                value.copy_(value.flip(2).clone())
        graph.replay()
        assert_same_bits(captured, case.op(**call))


@on_gpu
@for_every_op
def test_tensors_on_two_devices_raise(case: OpCase) -> None:
    for make in case.calls.values():
        call = make(torch.float32)
        there = target.native(call)
        tensors = [name for name, value in call.items() if isinstance(value, torch.Tensor)]
        for name in tensors if len(tensors) > 1 else ():
            with pytest.raises(ValueError, match=rf"longctx::{case.name}: `\w+` must be on the device of .*; got "):
                case.op(**(there | {name: call[name]}))


@on_gpu
@for_every_op
def test_a_device_that_is_not_current(case: OpCase) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: no other device to be current")
    for call in cuda_calls(case):
        expected = case.op(**call)
        other = {name: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for name, v in call.items()}
        for output, wanted in zip(as_tuple(case.op(**other)), as_tuple(expected), strict=True):
            assert output.device.index == 1
            torch.testing.assert_close(output.cpu(), wanted.cpu())


@on_gpu
@pytest.mark.parametrize("name", ["attention", "block_sparse_attention", "attention_mass", "block_scores"])
@pytest.mark.parametrize("dim", range(3))
def test_addresses_beyond_32_bits(name: str, dim: int) -> None:
    """Batch entries, heads or rows farther apart than 2^31 elements, all in one buffer."""
    case = CASES[name]
    call = target.native(case.calls["plain"](torch.bfloat16))
    arguments = [argument for argument in ("q", "k", "v") if argument in call]
    far = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 2 * far * 2:
        pytest.skip("less than 8 GiB of GPU memory are free")
    buffer = torch.empty(far + 2**24, dtype=torch.bfloat16, device="cuda")
    views = {}
    for place, argument in enumerate(arguments):
        near = call[argument]
        if dim < 2 or name != "block_sparse_attention":  # whose list counts the rows
            near = near.narrow(dim, 0, 2)
        stride = (2**31 // (near.shape[dim] - 1)) + 64
        strides = [near.stride(0), near.stride(1), near.stride(2), 1]
        strides[dim] = stride // 8 * 8
        views[argument] = buffer[place * 2**20 :].as_strided(near.shape, strides)
        views[argument].copy_(near)
    call |= {"lse": call["lse"].narrow(dim, 0, 2)} if "lse" in call else {}
    contiguous = {argument: view.contiguous() for argument, view in views.items()}
    assert_same_result(name, case.op(**(call | views)), case.op(**(call | contiguous)))


@on_gpu
@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_forced_paths(path: Literal["sm80", "sm90"]) -> None:
    q = torch.zeros(1, 1, 256, 128, dtype=torch.bfloat16, device="cuda")
    if path == "sm90" and not torch.ops.longctx._cuda_attention_path(q, q, q).startswith("sm90"):
        pytest.skip("this GPU or this build has no sm_90a path")
    with force_cuda_path(path):
        assert torch.ops.longctx._cuda_attention_path(q, q, q) == f"{path}: forced"
        for seed, dim in enumerate((64, 128, 256)):
            call = qkv(torch.bfloat16, seqlen_q=200, seqlen_k=333, head_dim=dim, seed=seed)
            check_attention("attention", call)
            check_attention("block_sparse_attention", random_blocks(call, block_size_q=128, block_size_k=128))
    with pytest.raises(ValueError, match="longctx::_force_cuda_path: `path` must be"), force_cuda_path("sm70"):  # type: ignore[arg-type]
        pass
