"""Adapters to other libraries, each imported when its library is."""

from __future__ import annotations

import importlib

from longctx.integrations._import_hook import when_imported

OLDEST_TRANSFORMERS, FIRST_UNSUPPORTED_TRANSFORMERS = (5, 20), (6, 0)


def install() -> None:
    """Registers ``attn_implementation="longctx"`` as soon as transformers has its attention interface."""
    when_imported("transformers.modeling_utils", _register_with_transformers)


def supports_transformers(version: str) -> bool:
    major, minor = (int(part) for part in version.split(".")[:2])
    return OLDEST_TRANSFORMERS <= (major, minor) < FIRST_UNSUPPORTED_TRANSFORMERS


def _register_with_transformers() -> None:
    import transformers

    # An import of transformers must not fail because of us; an unsupported version just does not know the name.
    if supports_transformers(transformers.__version__):
        importlib.import_module("longctx.integrations.transformers")
