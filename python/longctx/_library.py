"""Loads the op libraries into torch."""

from __future__ import annotations

from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent
OLDEST_TORCH = (2, 10)


def load() -> None:
    """Loads liblongctx.so (schemas and CPU kernels) and, beside a CUDA torch, liblongctx_cuda.so."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise ImportError(f"longctx needs torch >= 2.10; found torch {torch.__version__}")
    library = DIRECTORY / "liblongctx.so"
    if not library.is_file():
        raise ImportError("longctx was not built: liblongctx.so is missing. Install it with `pip install .`")
    torch.ops.load_library(str(library))
    cuda_library = DIRECTORY / "liblongctx_cuda.so"
    if torch.version.cuda is not None and cuda_library.is_file():
        torch.ops.load_library(str(cuda_library))


def loaded() -> dict[str, str]:
    """The op libraries in this process, by name."""
    return {Path(path).name: path for path in sorted(torch.ops.loaded_libraries) if "longctx" in Path(path).name}
