"""What is particular to the CUDA kernels: their limits here, and what only a GPU can show."""

from __future__ import annotations

import re

import pytest
import torch

import target
from cases import CASES, OpCase, qkv, random_blocks

on_cuda_kernels = pytest.mark.runs_on("cuda", "simt", reason="about the CUDA kernels: --device cuda or --simt")


def supported(*cases: OpCase) -> list[OpCase]:
    return [case for case in cases if case.name in target.ops]


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
    call = qkv(torch.float32, head_dim=300, head_dim_v=16)
    if name == "block_sparse_attention":
        call = random_blocks(call, block_size_q=16, block_size_k=16)
    if name in ("attention_mass", "block_scores"):
        del call["v"]
    rule = f"longctx::{name}: `q` must have a head_dim of at most 256 on CUDA; got 300"
    with pytest.raises(ValueError, match=re.escape(rule)):
        CASES[name].op(**call)
    if "v" in call:
        rule = f"longctx::{name}: `v` must have a head_dim of at most 256 on CUDA; got 300"
        narrow = {"q": call["q"][..., :16], "k": call["k"][..., :16], "v": call["k"]}
        with pytest.raises(ValueError, match=re.escape(rule)):
            CASES[name].op(**(call | narrow))
