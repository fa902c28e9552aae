"""The compiled part of the page store, or a clear error where it was not built."""

from __future__ import annotations

try:
    from longctx._host import FrameTable, NoFrameError, PageFile, PageFileError
except ImportError as error:
    raise ImportError(
        "longctx.store needs longctx._host, which is built where pybind11 and the Python headers are found"
    ) from error

__all__ = ["FrameTable", "NoFrameError", "PageFile", "PageFileError"]
