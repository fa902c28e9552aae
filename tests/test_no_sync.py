"""Nothing waits for the device: no op, no selection and no policy reads a value on the host or copies between devices.

Checked on meta tensors, which stand for a device without values. What would have to know one (`item`, `nonzero`, a mask
as an index, `repeat_interleave` without a size) raises; what brings in or takes out memory of the host is seen by
`OneDevice`. `test_cuda.py` asks the CUDA runtime the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longctx.prefill import AttentionContext, LMInfinite
from policy_cases import CALLS, POLICIES, rope
from test_conventions import for_every_call

pytestmark = pytest.mark.runs_on("cpu", reason="checked on meta tensors")


class OneDevice(TorchDispatchMode):
    """Fails at any operator that sees or makes tensors of two devices: a copy, and so a wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        if func.namespace != "prim" and len(devices) > 1:
            raise AssertionError(f"{func} joins the devices {sorted(devices)}")
        return out


def on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", [*POLICIES, "lminfinite"])
def test_policies(name: str, kind: str) -> None:
    case, policy = CALLS[kind], POLICIES.get(name, LMInfinite(num_global_tokens=5, window_size=40))
    q, k, v = map(on_meta, (case.q, case.k, case.v))
    options = {key: on_meta(value) for key, value in case.options.items()}
    context = AttentionContext(layer_idx=1, rope=rope, **options)
    with OneDevice():
        pattern = policy.select(q, k, context)
        assert pattern.density().shape == ()
        out, lse = policy.attend(q, k, v, context)
    assert (out.shape, out.device.type) == ((*case.q.shape[:3], case.v.shape[3]), "meta")
    assert (lse.shape, lse.device.type) == (case.q.shape[:3], "meta")


@for_every_call
def test_ops(case: Any, variant: str) -> None:
    for dtype in case.dtypes:
        call = {name: on_meta(value) for name, value in case.calls[variant](dtype).items()}
        with OneDevice():
            case.op(**call)


TENSOR = torch.arange(3, device="meta")


@pytest.mark.parametrize(
    "sync",
    [
        lambda: int(TENSOR.sum()),
        lambda: bool(TENSOR.any()),
        lambda: TENSOR.tolist(),
        lambda: TENSOR.cpu(),
        lambda: TENSOR.to("cpu"),
        lambda: TENSOR.nonzero(),
        lambda: TENSOR[TENSOR > 1],
        lambda: TENSOR.unique(),
        lambda: torch.masked_select(TENSOR, TENSOR > 1),
        lambda: TENSOR.repeat_interleave(TENSOR),
        lambda: torch.zeros(3).to("meta"),
        lambda: torch.tensor([1, 2, 3]).to("meta") + TENSOR,
        lambda: TENSOR + torch.arange(3),
    ],
)
def test_a_wait_is_noticed(sync: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OneDevice():
        sync()
