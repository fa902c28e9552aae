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
