"""What every op file needs to tell torch about its op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register_op(name: str, fake: Callable[..., Any]) -> None:
    """Registers the fake kernel of `longctx::<name>` and a backward that raises.

    Without a registered backward, autograd would return silently wrong gradients.
    """
    qualified = f"longctx::{name}"

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        _require_one_device(qualified, args, kwargs)
        return fake(*args, **kwargs)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{qualified} has no backward yet; call it under torch.no_grad()")

    torch.library.register_fake(qualified, checked_fake)
    torch.library.register_autograd(qualified, backward)


def _require_one_device(qualified: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ValueError(f"{qualified}: all tensors must be on one device; got {', '.join(devices)}")
