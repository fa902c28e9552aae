"""How the functions of this package call their ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`op(*args)`, past torch's autograd kernels where no gradient is recorded.

    What `torch.library.register_autograd` puts there is Python that unpacks the arguments and calls the op once
    more, which takes as long as a small op; without a gradient it does nothing else. Ops that change an argument
    have none and are called directly.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)
