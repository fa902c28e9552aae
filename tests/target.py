"""The kernels that a test run is about: the CPU's, a GPU's, or the GPU's run on CPU fibers (host SIMT).

Tests build their inputs on the CPU, always. `--device cuda` replaces the CPU kernel of every op by a function that
moves the call to the GPU and the results back; `--simt` loads a library that replaces it by the CUDA kernel run on
fibers. So every test of an op is a test of each device, and what only some devices can do is said here once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx import _library
from longctx.testing import ISAS

# What docs/support_matrix.md calls each target.
LABELS = {"cpu": "cpu", "cuda": "cuda", "simt": "cuda (host SIMT)"}
# Larger inputs are not compared with what the kernel left of them.
MAX_COMPARED_BYTES = 1 << 24

# Set by `choose`, before any test module is imported.
name = "cpu"
ops = frozenset(longctx.ops.__all__)  # those whose kernels are the target's
_replaced: list[torch.library.Library] = []


def choose(device: str, simt: str | None, simt_mode: str | None) -> None:
    """Makes the ops run where the options of this test run say; raises where that is impossible."""
    global name, ops
    if simt is not None and device != "cpu":
        raise pytest.UsageError("--simt runs the CUDA kernels on the CPU: it cannot be combined with --device cuda")
    if simt_mode is not None and simt is None:
        raise pytest.UsageError("--simt-mode needs --simt LIBRARY")
    if device == "cuda":
        _require_gpu()
        name, ops = "cuda", cuda_ops()
        _replaced.extend(_replace(op) for op in sorted(ops))
    elif simt is not None:
        name, ops = "simt", _load_simt(Path(simt), simt_mode)


def label() -> str:
    return LABELS[name]


def isas() -> tuple[str, ...]:
    """The instruction sets that the fixture `isa` goes through; "-" where there is nothing to choose."""
    return ISAS if name == "cpu" else ("-",)


def dtypes(*, float64: bool = False) -> tuple[torch.dtype, ...]:
    """What the ops take: float64 on the CPU, and elsewhere only where `float64` says so."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return (torch.float32, torch.float64, *narrow[1:]) if name == "cpu" or float64 else narrow


def describe() -> str:
    if name == "cpu":
        info = json.loads(torch.ops.longctx.build_info())
        return f"isa {info['isa']} of {info['detected_isa']}, engines {info['engines']}"
    place = torch.cuda.get_device_name() if name == "cuda" else "CPU fibers"
    missing = sorted(set(longctx.ops.__all__) - ops)
    on_cpu = f"; not in the library and left to the CPU kernels: {', '.join(missing)}" if missing else ""
    return f"CUDA kernels on {place}: {', '.join(sorted(ops)) or 'none'}{on_cpu}"


def cuda_ops() -> frozenset[str]:
    """The ops that have a CUDA kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in longctx.ops.__all__ if has_kernel(f"longctx::{op}", "CUDA"))


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Inside, with `--device cuda`, the ops run on the CPU for CPU tensors again."""
    for library in _replaced:
        library._destroy()
    replaced = len(_replaced)
    _replaced.clear()
    try:
        yield
    finally:
        if replaced:
            _replaced.extend(_replace(op) for op in sorted(ops))


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor on `device`, at the same place of a copy of its whole storage: offset, strides and neighbours too."""
    storage = tensor.untyped_storage()
    copy = storage.clone() if storage.device.type == device else storage.to(device=torch.device(device))
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(
        copy, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def native(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as tensors of the target: on the GPU with `--device cuda`."""
    device = "cuda" if name == "cuda" else "cpu"
    return {key: moved(value, device) if isinstance(value, Tensor) else value for key, value in call.items()}


def storage_bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def written_arguments(op: Any) -> frozenset[int]:
    """The places of the arguments that an op of torch.ops changes, by its schema."""
    arguments = enumerate(op._schema.arguments)
    return frozenset(place for place, argument in arguments if argument.alias_info and argument.alias_info.is_write)


def through(device: str, run: Callable[..., Any], written: frozenset[int] = frozenset()) -> Callable[..., Any]:
    """`run` on copies of its tensors on `device`, its results and the `written` arguments brought back.

    Fails where it writes into another input.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []
        changed: list[tuple[Tensor, Tensor]] = []

        def there(value: Any, place: int | None = None) -> Any:
            if isinstance(value, list):
                return [there(item, place) for item in value]
            if isinstance(value, Tensor):
                (changed if place in written else pairs).append((value, moved(value, device)))
                return (changed if place in written else pairs)[-1][1]
            return value

        positional = [there(value, place) for place, value in enumerate(args)]
        results = run(*positional, **{key: there(value) for key, value in kwargs.items()})
        for here, there_ in changed:
            storage_bytes(here).copy_(storage_bytes(there_))
        for here, there_ in pairs:
            if here.untyped_storage().nbytes() <= MAX_COMPARED_BYTES:
                assert torch.equal(storage_bytes(here), storage_bytes(there_).cpu()), "the op wrote into an input"
        if results is None:
            return None
        outputs = results if isinstance(results, tuple) else (results,)
        assert all(output.device.type == device for output in outputs)
        brought = tuple(output.cpu() for output in outputs)
        return brought if isinstance(results, tuple) else brought[0]

    return call


def _replace(op: str) -> torch.library.Library:
    """Replaces the CPU kernel of `op` by its CUDA kernel, until the result is destroyed."""
    library = torch.library.Library("longctx", "IMPL")
    run = getattr(torch.ops.longctx, op).default
    library.impl(op, through("cuda", run, written_arguments(run)), "CPU", allow_override=True)
    return library


def _require_gpu() -> None:
    if torch.version.cuda is None:
        raise pytest.UsageError(f"--device cuda needs a torch with CUDA; torch {torch.__version__} has none")
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU; torch.cuda.is_available() is False")
    if "liblongctx_cuda.so" not in _library.loaded():
        raise pytest.UsageError("--device cuda needs liblongctx_cuda.so; build with -DLONGCTX_CUDA=ON")


def _cpu_kernel(op: str) -> str:
    """Where the kernel that CPU tensors reach was registered."""
    found = re.search(r"^CPU: registered at (.*)$", torch._C._dispatch_dump(f"longctx::{op}"), re.MULTILINE)
    return found[1] if found else ""


def _load_simt(path: Path, mode: str | None) -> frozenset[str]:
    """Loads the library; returns the ops whose CPU kernels it replaced."""
    if not path.is_file():
        raise pytest.UsageError(f"--simt needs the library of tests/simt; there is no {path}")
    before = {op: _cpu_kernel(op) for op in ops}
    torch.ops.load_library(str(path.resolve()))
    if mode is not None:
        parts = mode.split(",")
        if len(parts) not in (3, 4) or not parts[2].isdecimal():
            raise pytest.UsageError(f"--simt-mode must be schedule,landing,seed or those and a device; got {mode!r}")
        if not hasattr(torch.ops.longctx_simt, "configure"):
            raise pytest.UsageError(f"{path.name} has no longctx_simt::configure, which --simt-mode needs")
        torch.ops.longctx_simt.configure(parts[0], parts[1], int(parts[2]))
        for device in parts[3:]:
            torch.ops.longctx_simt.choose_device(device)
    return frozenset(op for op in ops if _cpu_kernel(op) != before[op])
