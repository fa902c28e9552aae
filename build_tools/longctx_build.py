"""Build backend: scikit-build-core, plus torch as a build requirement where the target has none.

pip's build isolation hides the target's torch from imports but not from `sysconfig`, and CMake
finds its headers there. Asking for torch unconditionally would download it a second time.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import get_requires_for_build_wheel as _get_requires_for_build_wheel

TORCH = "torch==2.13.0"


def _target_has_torch() -> bool:
    site_packages = {sysconfig.get_path("platlib"), sysconfig.get_path("purelib")}
    return any((Path(path) / "torch" / "include").is_dir() for path in site_packages)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    requires = _get_requires_for_build_wheel(config_settings)
    return requires if _target_has_torch() else [*requires, TORCH]
