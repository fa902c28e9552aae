"""Prints the include folder of CUTLASS from the `nvidia-cutlass` package, without importing it; nothing if absent.

Under build isolation the target's site-packages are hidden from imports, but `sysconfig` still
knows them.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

PACKAGE = "cutlass_library"


def candidates() -> list[Path]:
    spec = importlib.util.find_spec(PACKAGE)
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    return found + [Path(sysconfig.get_path(name)) / PACKAGE for name in ("platlib", "purelib")]


def include_folder() -> Path | None:
    folders = (path / "source" / "include" for path in candidates())
    return next((folder for folder in folders if (folder / "cutlass" / "version.h").is_file()), None)


if __name__ == "__main__":
    print(include_folder() or "")
