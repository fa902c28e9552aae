"""Measurements that are not one op beside one peer: memory, threads, and what selecting costs."""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time

import torch

import longctx
from longctx.benchmark import time_interleaved

# Runs in a fresh process. Writing 5 to clear_refs sets the peak resident size back to the current one, so that
# what making the inputs took does not hide what the call takes.
MEMORY_PROBE = """
import re, sys, torch, longctx
from longctx.benchmark.prefill_cases import random_block_list
torch.set_num_threads(1)
length, heads, dim, block = 131072, 8, 128, 128
q, k, v = (torch.randn(1, heads, length, dim).bfloat16() for _ in range(3))
if sys.argv[1] == "sparse":
    indptr, indices, _ = random_block_list(heads, length // block, 0.02)
    call = lambda: longctx.block_sparse_attention(q, k, v, indptr, indices, block, block)
else:
    call = lambda: longctx.attention(q, k, v, window_size_left=1023, num_sink_tokens=128)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
outputs = call()
print(peak() - before - sum(output.nbytes for output in outputs))
"""


def memory_at_128k() -> dict[str, object]:
    """Peak resident memory of a call beyond inputs and outputs: 128k tokens, 8 heads, D=128, bf16."""

    def probe(kind: str) -> float:
        command = [sys.executable, "-c", MEMORY_PROBE, kind]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20

    sparse, window = probe("sparse"), probe("window")
    return {
        "what": "peak memory beyond inputs and outputs, 128k tokens, 8 heads, D=128 bf16",
        "measured": f"block sparse {sparse:.1f} MiB, sinks + window {window:.1f} MiB",
        "target": "< 64 MiB + block list",
        "mebibytes": {"block_sparse": sparse, "window": window},
    }


def thread_scaling(rounds: int = 5) -> dict[str, object]:
    """Wall time of one thread over that of two, dense causal bf16 8k, 8 heads, D=128."""
    q, k, v = (torch.randn(1, 8, 8192, 128).bfloat16() for _ in range(3))
    threads_before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(rounds + 1):
            for threads, times in seconds.items():
                torch.set_num_threads(threads)
                start = time.perf_counter()
                longctx.attention(q, k, v)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads_before)
    ratio = statistics.median(a / b for a, b in zip(seconds[1][1:], seconds[2][1:], strict=True))
    return {
        "what": "two threads over one (wall), dense causal bf16 8k, 8 heads, D=128",
        "measured": f"{ratio:.2f}x",
        "target": "1.8x",
        "ratio": ratio,
    }


def selection_share(length: int = 32768, rounds: int = 3) -> dict[str, object]:
    """What FlexPrefill's selection costs beside our dense attention at 32k, 8 query heads, bf16."""
    policy = longctx.get_policy("flexprefill")
    context = longctx.AttentionContext()
    shares: dict[str, float] = {}
    for num_kv_heads in (8, 2):
        q = torch.randn(1, 8, length, 128).bfloat16()
        k, v = (torch.randn(1, num_kv_heads, length, 128).bfloat16() for _ in range(2))
        contenders = {
            "select": functools.partial(policy.select, q, k, context),
            "dense": functools.partial(longctx.attention, q, k, v),
        }
        timings = time_interleaved(contenders, rounds)
        shares[f"8/{num_kv_heads}"] = timings["select"].median / timings["dense"].median
    return {
        "what": f"FlexPrefill selection beside our dense attention, {length} tokens, D=128 bf16",
        "measured": ", ".join(f"{share:.1%} with heads {heads}" for heads, share in shares.items()),
        "target": "4% / 2%",
        "share": shares,
    }
