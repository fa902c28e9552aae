"""Does every kernel work at all? Errors of every op, path, dtype and head_dim beside the CPU's, in seconds.

Announces each case as `case NAME` before it runs and takes `--after NAME`; ends with exit code 3 where a case took the
CUDA context with it, so that the rest runs in a process of its own (`Runner.cases`).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from longctx.testing import error_ratio, force_cuda_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import target

target.name = "cuda"  # before `cases` asks which dtypes a GPU takes
from cases import CASES  # noqa: E402
from checks import as_tuple, in_float64  # noqa: E402
from linear_cases import linear  # noqa: E402
from op_case import Call, int32, qkv  # noqa: E402
from prefill_cases import random_blocks  # noqa: E402

ALLOWED_RATIO = 4.0  # of the error to twice that of the CPU kernel and a unit in the last place
HALF = (torch.bfloat16, torch.float16)
# Rotated operands are rounded to 16 bits there, and not on the CPU: the tests compare these with PyTorch.
ROTATED = {("gather_attention", "roped"), ("gather_attention", "tree")}
INDICES = {"select_blocks", "threshold_select", "topk_select"}  # exact, and of no float64
Path_ = Literal["auto", "sm80", "sm90"]


@dataclass(frozen=True)
class Smoke:
    """One call; `make` builds it on the CPU."""

    name: str
    op: str
    make: Callable[[], Call]
    path: Path_ = "auto"


def packed(dtype: torch.dtype, head_dim: int) -> Call:
    call = qkv(dtype, batch=1, seqlen_q=400, seqlen_k=500, head_dim=head_dim)
    return call | {"cu_seqlens_q": int32(0, 17, 17, 300, 400), "cu_seqlens_k": int32(0, 60, 90, 390, 500)}


def attention_calls(dtype: torch.dtype, head_dim: int) -> Iterator[tuple[str, str, Callable[[], Call]]]:
    """From one tile without a mask to all that a tile can meet: the first that is wrong says what to look at."""
    make = functools.partial(qkv, dtype, head_dim=head_dim)
    long = functools.partial(make, seqlen_q=300, seqlen_k=557)
    one_head = functools.partial(make, batch=1, num_q_heads=1, num_kv_heads=1)
    yield "one tile", "attention", lambda: one_head(seqlen_q=64, seqlen_k=64) | {"causal": False}
    yield "several tiles", "attention", lambda: one_head(seqlen_q=256, seqlen_k=512) | {"causal": False}
    yield "causal, odd lengths, heads 4/2", "attention", long
    yield "window, sinks", "attention", lambda: long() | {"window_size_left": 100, "num_sink_tokens": 4}
    yield "one query, splits", "attention", lambda: make(batch=1, seqlen_q=1, seqlen_k=8192)
    yield "packed", "attention", lambda: packed(dtype, head_dim)
    for size_q, size_k in ((128, 128), (64, 64), (16, 16)):
        name = f"blocks of {size_q} x {size_k}"
        yield (
            name,
            "block_sparse_attention",
            functools.partial(random_blocks, long(), block_size_q=size_q, block_size_k=size_k),
        )


def attention_smokes(device: str) -> Iterator[Smoke]:
    q = torch.empty(1, 1, 128, 128, dtype=torch.bfloat16, device=device)
    choice = torch.ops.longctx._cuda_attention_path(q, q, q) if device == "cuda" else "the CPU's kernels"
    paths: list[tuple[Path_, tuple[torch.dtype, ...], tuple[int, ...]]] = [
        ("sm80", HALF, (64, 80, 96, 128, 192, 256)),
        ("auto", (torch.float32,), (64, 128, 256)),
    ]
    if choice.startswith("sm90"):
        paths.insert(0, ("sm90", HALF, (64, 80, 128, 256)))
    else:
        print(f"sm90 is not looked at: attention takes {choice}")
    for path, dtypes, head_dims in paths:
        for dtype in dtypes:
            for head_dim in head_dims:
                for name, op, make in attention_calls(dtype, head_dim):
                    if path == "sm90" and name == "blocks of 16 x 16":  # it takes no blocks below 64 keys
                        continue
                    kernel = path if path != "auto" else "float32"
                    yield Smoke(f"{kernel} {short(dtype)} {head_dim} {op}: {name}", op, make, path)


def linear_calls(dtype: torch.dtype, head_dim: int) -> Iterator[tuple[str, str, Callable[[], Call]]]:
    """From one chunk without a decay to all that a sweep can meet."""

    def make(length: int, decay: tuple[int, ...], heads: int = 1, batch: int = 1, **options: Any) -> Call:
        sizes = {"batch": batch, "num_q_heads": heads, "num_kv_heads": max(1, heads // 2), "head_dim": head_dim}
        return linear(dtype, decay=decay, seqlen_q=length, seqlen_k=length, **sizes, **options)

    def decoded(tokens: int, normalize: bool, **options: Any) -> Call:
        call = make(tokens, (2, 4, tokens), heads=4, batch=2, num_states=3, normalize=normalize)
        slots = {"state": call.pop("initial_state"), "state_indices": int32(2, 0), "normalize": normalize}
        return call | slots | options

    name = "linear_attention"
    yield "one chunk, no decay", name, lambda: make(64, (1,)) | {"log_decay": None}
    yield "one chunk", name, lambda: make(64, (1,))
    yield "several chunks, state", name, lambda: make(256, (1,), num_states=1) | {"num_segments": 1}
    yield "odd length, heads 4/2", name, lambda: make(301, (4,), heads=4, batch=2, num_states=2)
    yield "a decay per token", name, lambda: make(301, (2, 4, 301), heads=4, batch=2)
    yield "segments", name, lambda: make(640, (4,), heads=4) | {"num_segments": 3}
    yield "normalize", name, lambda: make(150, (4,), heads=4, normalize=True) | {"normalize": True}
    yield "packed", name, lambda: make(300, (4,), heads=4, num_states=4) | {"cu_seqlens": int32(0, 17, 17, 200, 300)}
    yield (
        "reverse, wide_out",
        name,
        lambda: make(301, (4,), heads=4, num_states=1) | {"reverse": True, "wide_out": True},
    )
    yield "all keys", name, lambda: make(301, (4,), heads=4) | {"causal": False}
    yield "all keys, no decay", name, lambda: make(301, (4,), heads=4) | {"causal": False, "log_decay": None}
    yield "states", f"{name}_states", lambda: without_q(make(301, (4,), heads=4))
    yield "states in reverse", f"{name}_states", lambda: without_q(make(301, (4,), heads=4)) | {"reverse": True}
    yield "one token", f"{name}_decode", lambda: decoded(1, False)
    yield "a draft, committed in part", f"{name}_decode", lambda: decoded(10, False, commit=int32(3, 10))
    yield "normalize", f"{name}_decode", lambda: decoded(2, True)


def without_q(call: Call) -> Call:
    return {name: value for name, value in call.items() if name != "q"}


def linear_smokes(device: str) -> Iterator[Smoke]:
    ops = target.cuda_ops() if device == "cuda" else CASES.keys()
    for dtype, head_dims in (
        (torch.bfloat16, (64, 80, 128, 256)),
        (torch.float16, (64, 128)),
        (torch.float32, (64, 128, 256)),
    ):
        for head_dim in head_dims:
            for name, op, make in linear_calls(dtype, head_dim):
                if op in ops:
                    yield Smoke(f"{short(dtype)} {head_dim} {op}: {name}", op, make)


def other_smokes(device: str) -> Iterator[Smoke]:
    """The calls that the tests share, of every op with a CUDA kernel."""
    ops = target.cuda_ops() if device == "cuda" else CASES.keys()
    for case in CASES.values():
        for variant, make in case.calls.items():
            for dtype in case.dtypes if case.name in ops else ():
                if dtype in HALF and (case.name, variant) in ROTATED:
                    continue
                yield Smoke(f"{case.name} {short(dtype)}: {variant}", case.name, functools.partial(make, dtype))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def where(wrong: Tensor) -> str:
    """Of the wrong elements how many there are and, dim by dim, how many of the indices they have: a layout shows."""
    places = wrong.nonzero()
    dims = [f"{len(index.unique())}/{size}" for index, size in zip(places.T, wrong.shape, strict=True)]
    return f"{len(places)}/{wrong.numel()} wrong, first at {places[0].tolist()}, indices a dim {' '.join(dims)}"


def compare(actual: Tensor, here: Tensor, exact: Tensor) -> tuple[str, bool]:
    """What to print about an output, and whether it is right. `here` is the CPU kernel's."""
    if not actual.is_floating_point():
        return ("equal", True) if torch.equal(actual, here) else (where(actual != here), False)
    infinite = ~exact.isfinite()
    if not torch.equal(actual[infinite].double(), exact[infinite]):
        return f"not the same infinities; {where((actual != exact) & infinite)}", False
    actual, here, exact = (x.masked_fill(infinite, 0.0) for x in (actual, here, exact))
    ratio = error_ratio(actual, exact, here)
    error, error_here = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (actual, here))
    text = f"error {error:.1e} (CPU {error_here:.1e})"
    if ratio <= ALLOWED_RATIO:
        return text, True
    allowed = 16.0 * error_here + 16.0 * torch.finfo(actual.dtype).eps * float(exact.abs().max())
    return f"{text}, {where(~((actual.double() - exact).abs() <= allowed))}", False


def run(smoke: Smoke, device: str) -> bool:
    call, op = smoke.make(), CASES[smoke.op].op
    there = {name: target.moved(value, device) if isinstance(value, Tensor) else value for name, value in call.items()}
    with force_cuda_path(smoke.path) if device == "cuda" else nullcontext():
        results = tuple(output.cpu() for output in as_tuple(op(**there)))
    here = as_tuple(op(**call))
    exact = here if smoke.op in INDICES else as_tuple(op(**in_float64(call)))
    texts, right = zip(*map(compare, results, here, exact), strict=True)
    print(f"{'ok   ' if all(right) else 'WRONG'} {smoke.name}: {'; '.join(texts)}", flush=True)
    return all(right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--after", metavar="NAME", help="leave out the cases up to this one")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to try this script")
    args = parser.parse_args()
    smokes = [*attention_smokes(args.device), *linear_smokes(args.device), *other_smokes(args.device)]
    first = 1 + [smoke.name for smoke in smokes].index(args.after) if args.after else 0
    right = True
    for smoke in smokes[first:]:
        print(f"case {smoke.name}", flush=True)
        try:
            right &= run(smoke, args.device)
        except Exception as error:  # a kernel may fail in any way, and the next one may still work
            print(f"WRONG {smoke.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
            right = False
            if args.device == "cuda" and not works():
                return 3
    return 0 if right else 1


def works() -> bool:
    """Whether the GPU still serves this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
