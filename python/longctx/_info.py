"""What this installation is made of and what it would run."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

import longctx
from longctx import _library, ops


def info() -> dict[str, Any]:
    """Versions, machine, instruction set, engine per dtype, loaded libraries and ops.

    The answer about instruction sets and engines comes from the op library itself, which alone knows
    what it chose.

    Example:
        >>> import longctx
        >>> longctx.info()["build"]["isa"] in ("generic", "avx2", "avx512", "amx")
        True
    """
    return {
        "longctx": longctx.__version__,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "build": json.loads(torch.ops.longctx.build_info()),
        "cuda_build": json.loads(torch.ops.longctx.cuda_build_info()) if _has_cuda() else None,
        "host": _host_info(),
        "libraries": {name: os.path.getsize(path) for name, path in _library.loaded().items()},
        "devices": ["cpu", *(["cuda"] if _has_cuda() else [])],
        "ops": sorted(ops.__all__),
    }


def _has_cuda() -> bool:
    return "liblongctx_cuda.so" in _library.loaded()


def _host_info() -> dict[str, Any]:
    try:
        from longctx import _host
    except ImportError:  # built without Python headers, or for another Python: the ops still work
        return {"num_cpus": os.cpu_count()}
    return dict(_host.host_info())


PATH_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATH_HEAD_DIMS = (64, 80, 96, 128, 192, 256)


def cuda_info() -> dict[str, Any]:
    """What the CUDA library was built with and which kernel attention would take on this machine's GPU, and why.

    Without a GPU, or without the library, the answer says what is missing.
    """
    if torch.version.cuda is None:
        return {"available": False, "why": f"torch {torch.__version__} has no CUDA"}
    if "liblongctx_cuda.so" not in _library.loaded():
        return {"available": False, "why": "liblongctx_cuda.so was not built (-DLONGCTX_CUDA=ON)"}
    build = json.loads(torch.ops.longctx.cuda_build_info())
    build["kernels"] = sorted(build.pop("shared_bytes"))  # kernel/family/dtype/head_dim
    if not torch.cuda.is_available():
        return {"available": False, "why": "torch sees no GPU", "build": build}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "available": True,
        "device": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
        "build": build,
        "attention": attention_paths("cuda"),
    }


def attention_paths(device: str) -> dict[str, str]:
    """The kernel of causal attention per dtype and head_dim, and of strides that TMA cannot take, each with why."""
    paths = {}
    for dtype in PATH_DTYPES:
        for head_dim in PATH_HEAD_DIMS:
            q = torch.empty(1, 1, 1024, head_dim, dtype=dtype, device=device)
            paths[f"{str(dtype).removeprefix('torch.')} {head_dim}"] = torch.ops.longctx._cuda_attention_path(q, q, q)
    odd = torch.empty(1, 1, 1024, 129, dtype=torch.bfloat16, device=device)[..., 1:]
    paths["bfloat16 128, odd strides"] = torch.ops.longctx._cuda_attention_path(odd, odd, odd)
    return paths
