"""The compiled part of the page store. Where it was not built, importing is fine and using raises."""

from __future__ import annotations

from typing import Any

try:
    from longctx._host import FrameTable, NoFrameError, PageFile, PageFileError
except ImportError:

    def _not_built(*_: Any, **__: Any) -> None:
        raise ImportError(
            "longctx: a page store needs longctx._host, which is built where pybind11 and the Python headers are found"
        )

    class _NotBuilt:
        __init__ = _not_built
        create = open = staticmethod(_not_built)

    FrameTable = PageFile = _NotBuilt
    NoFrameError = PageFileError = RuntimeError

__all__ = ["FrameTable", "NoFrameError", "PageFile", "PageFileError"]
