"""The one error of a page store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from longctx.store._host import PageFileError


class PageStoreError(RuntimeError):
    """A store that cannot do what was asked; the message names the file, the page and the reason."""


@contextlib.contextmanager
def as_store_error() -> Iterator[None]:
    """Errors of the page file as `PageStoreError`."""
    try:
        yield
    except PageFileError as error:
        raise PageStoreError(str(error)) from None
