"""Prints `<torch directory>;<ON|OFF>` (whether that torch has CUDA) without importing torch.

Under build isolation the target's site-packages are hidden from imports, but `sysconfig` still
knows them.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

OLDEST = (2, 10)


def candidates() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    return found + [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]


def find() -> tuple[Path, bool] | None:
    """The directory of the first torch that is new enough, and whether it has CUDA."""
    for path in candidates():
        version = path / "version.py"
        if not (path / "include" / "torch" / "csrc" / "stable").is_dir() or not version.is_file():
            continue
        text = version.read_text()
        match = re.search(r"__version__ = '(\d+)\.(\d+)", text)
        if match and (int(match[1]), int(match[2])) >= OLDEST:
            return path, re.search(r"^cuda: .* = '\d", text, re.MULTILINE) is not None
    return None


def main() -> int:
    found = find()
    if found is None:
        return 1
    print(f"{found[0]};{'ON' if found[1] else 'OFF'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
