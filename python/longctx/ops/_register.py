"""What every op file needs to tell torch about its op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Gradient(Protocol):
    """A module with a gradient rule: what `torch.library.register_autograd` takes."""

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    def backward(self, ctx: Any, *grads: Any) -> Any: ...


def register_op(
    name: str, fake: Callable[..., Any], *, gradient: Gradient | None = None, differentiable: bool = True
) -> None:
    """Registers the fake kernel of `longctx::<name>` and its gradient rule, or a backward that raises.

    Without a registered backward, autograd would return silently wrong gradients. torch takes none for
    an op that changes an argument: such an op is not `differentiable`, and its function refuses inputs
    that require a gradient.
    """
    qualified = f"longctx::{name}"
    arguments = [argument.name for argument in getattr(torch.ops.longctx, name).default._schema.arguments]

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        _require_one_device(qualified, dict(zip(arguments, args, strict=False)) | kwargs)
        return fake(*args, **kwargs)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{qualified} has no backward yet; call it under torch.no_grad()")

    torch.library.register_fake(qualified, checked_fake)
    if gradient is not None:
        torch.library.register_autograd(qualified, gradient.backward, setup_context=gradient.setup_context)
    elif differentiable:
        torch.library.register_autograd(qualified, backward)


def _require_one_device(qualified: str, arguments: dict[str, Any]) -> None:
    devices = {
        name: tensor.device
        for name, value in arguments.items()
        for tensor in (value if isinstance(value, list | tuple) else [value])
        if isinstance(tensor, torch.Tensor)
    }
    first = next(iter(devices), "")
    for name, device in devices.items():
        if device != devices[first]:
            raise ValueError(
                f"{qualified}: `{name}` must be on the device of `{first}`, {devices[first]}; got {device}"
            )
