"""Long-context attention kernels for CPU and CUDA, and the published methods built on them.

The ops are `torch.ops.longctx.*`; the functions here are the same ops with defaults and docstrings.
"""

from __future__ import annotations

import importlib
from typing import Any

from longctx import _library
from longctx.integrations import install
from longctx.ops import *  # noqa: F403
from longctx.ops import __all__ as _op_names

__version__ = "0.1.0"

# Imported on first use, so that `import longctx` costs no more than loading the op library.
_LAZY = {
    "AttentionContext": "longctx.prefill",
    "Pattern": "longctx.prefill",
    "Policy": "longctx.prefill",
    "apply": "longctx.integrations.transformers",
    "coverage": "longctx.prefill",
    "get_policy": "longctx.prefill",
    "info": "longctx._info",
}
_LAZY_MODULES = (
    "benchmark",
    "cache",
    "integrations",
    "linear",
    "models",
    "prefill",
    "reference",
    "store",
    "testing",
)

__all__ = ["__version__", *_LAZY, *_op_names]

_library.load()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"longctx.{name}")
    raise AttributeError(f"module 'longctx' has no attribute {name!r}")


install()
