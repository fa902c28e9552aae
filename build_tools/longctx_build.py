"""Build backend: scikit-build-core, plus torch and CUTLASS as build requirements where the target lacks them.

pip's build isolation hides the target's packages from imports but not from `sysconfig`, and CMake
finds their headers there. Asking for torch unconditionally would download it a second time.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import find_cutlass
import find_torch
from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import get_requires_for_build_wheel as _get_requires_for_build_wheel

TORCH = "torch==2.13.0"
CUTLASS = "nvidia-cutlass==4.2.0.0"


def _target_has_torch() -> bool:
    site_packages = {sysconfig.get_path("platlib"), sysconfig.get_path("purelib")}
    return any((Path(path) / "torch" / "include").is_dir() for path in site_packages)


def _builds_cuda(settings: dict) -> bool:
    """As CMakeLists.txt decides: on request, or beside a torch that has CUDA where there is nvcc."""
    asked = settings.get("cmake.define.LONGCTX_CUDA")
    if asked is not None:
        return str(asked).upper() in ("ON", "1", "TRUE", "YES")
    found = find_torch.find()
    return found is not None and found[1] and shutil.which("nvcc") is not None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    settings = config_settings or {}
    requires = _get_requires_for_build_wheel(config_settings)
    if not _target_has_torch():
        requires = [*requires, TORCH]
    has_cutlass = "cmake.define.LONGCTX_CUTLASS_DIR" in settings or find_cutlass.include_folder() is not None
    if _builds_cuda(settings) and not has_cutlass:
        requires = [*requires, CUTLASS]
    return requires
