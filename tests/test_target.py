"""The machinery that runs every op test on another device."""

from __future__ import annotations

import pytest
import torch

import longctx
import target
from cases import CASES
from checks import as_tuple, assert_same_bits
from longctx.testing import surround_with_nan


def test_moved_keeps_place_and_neighbours() -> None:
    view = surround_with_nan(torch.arange(24.0).view(1, 2, 3, 4), layout="bshd")[:, :, 1:]
    copy = target.moved(view, "cpu")
    assert (copy.shape, copy.stride(), copy.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
    assert torch.equal(copy, view)
    assert copy.untyped_storage().nbytes() == view.untyped_storage().nbytes()
    assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    broadcast = torch.ones(1, 3).expand(2**40, 3)
    assert target.moved(broadcast, "cpu").stride() == (0, 1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_through_gives_what_the_op_gives(case: CASES) -> None:  # type: ignore[valid-type]
    call = case.calls["plain"](torch.float32)
    through = target.through("cpu", case.op)
    assert_same_bits(through(**call), case.op(**call))
    assert isinstance(through(**call), tuple) == isinstance(case.op(**call), tuple)
    assert all(output.device.type == "cpu" for output in as_tuple(through(**call)))


def test_through_brings_changed_arguments_back() -> None:
    case = CASES["linear_attention_decode"]
    op = torch.ops.longctx.linear_attention_decode.default
    assert target.written_arguments(op) == {4}
    call = case.calls["plain"](torch.float32)
    inputs = [call[name] for name in ("q", "k", "v", "log_decay")]
    options = (None, None, 1.0, False, 1e-6)
    expected = call["state"].clone()
    out = op(*inputs, expected, *options)
    view = surround_with_nan(call["state"], layout="bshd")
    assert_same_bits(target.through("cpu", op, target.written_arguments(op))(*inputs, view, *options), out)
    assert_same_bits(view, expected)


def test_through_brings_changed_lists_back() -> None:
    op = torch.ops.longctx.compact_kv.default
    assert target.written_arguments(op) == {0, 1}
    call = CASES["compact_kv"].calls["plain"](torch.float32)
    caches = [[call[name], call[name] + 1.0] for name in ("k_cache", "v_cache")]
    expected = [[cache.clone() for cache in layers] for layers in caches]
    lengths = op(*expected, call["indices"])
    assert_same_bits(target.through("cpu", op, target.written_arguments(op))(*caches, call["indices"]), lengths)
    assert_same_bits((*caches[0], *caches[1]), (*expected[0], *expected[1]))


def test_through_an_op_without_outputs() -> None:
    call = CASES["update_pages"].calls["plain"](torch.float32)
    op = torch.ops.longctx.update_pages.default
    arguments = (call["k"], call["start"], None, call["page_size"])
    expected, summary = call["summary"].clone(), call["summary"].clone()
    op(expected, *arguments)
    assert not torch.equal(expected, summary)
    assert target.through("cpu", op, target.written_arguments(op))(summary, *arguments) is None
    assert_same_bits(summary, expected)


def test_through_notices_a_written_input() -> None:
    def op(tensor: torch.Tensor) -> torch.Tensor:
        tensor[..., -1] += 1.0
        return tensor.clone()

    with pytest.raises(AssertionError, match="wrote into an input"):
        target.through("cpu", op)(torch.zeros(3))


@pytest.mark.runs_on("cpu", reason="about the options of a test run")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("cpu", "missing.so", None), "there is no missing.so"),
        (("cuda", "missing.so", None), "cannot be combined"),
        (("cpu", None, "random,late,0"), "--simt-mode needs --simt"),
        (("cpu", __file__, None), "Could not load"),
    ],
)
def test_options_that_cannot_be_served(options: tuple[str, str | None, str | None], message: str) -> None:
    with pytest.raises((pytest.UsageError, OSError), match=message):
        target.choose(*options)


@pytest.mark.runs_on("cpu", reason="about the options of a test run")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(pytest.UsageError, match="--device cuda needs a"):
        target.choose("cuda", None, None)


def test_ops_run_on_the_target() -> None:
    """Of a CUDA library those that it holds; the report header says which."""
    if target.name == "cpu":
        assert target.ops == set(longctx.ops.__all__)
    assert {"attention", "block_sparse_attention"} <= target.ops
