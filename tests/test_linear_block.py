"""TransNormerBlock against its formula, and padding inside a batch against each sequence alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import assert_same_bits
from longctx import linear
from longctx.linear import LightningAttention, LightningState, TransNormerBlock
from op_case import DTYPES
from test_linear_attention import TOLERANCE, relative_error
from test_linear_layers import HIDDEN, formula, inputs, layer_of, paths

BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lrpe": {"use_lrpe": True},
    "grouped": {"num_kv_heads": 2, "head_dim": 20, "bias": True},
}
LAYERS: dict[str, dict[str, Any]] = {
    "lrpe": {"use_lrpe": True, "bias": True},
    "minimax": {"variant": "minimax"},
}
# Sequences of 70, 9 and 66 tokens: padding before, around and between them.
MASK = torch.ones(3, 70, dtype=torch.bool)
MASK[1, :50] = MASK[1, 52:55] = MASK[1, 66:] = MASK[1, 60] = False
MASK[2, 3:6] = MASK[2, 64] = False


def block_of(dtype: torch.dtype = torch.float32, **options: Any) -> TransNormerBlock:
    torch.manual_seed(0)
    log_decay = linear.transnormer_code_log_decay(4, layer_idx=1, num_layers=6)
    return TransNormerBlock(HIDDEN, 80, 4, log_decay, **options).to(dtype).requires_grad_(False)


def block_formula(block: TransNormerBlock, x: Tensor) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        wide = x.double()
        return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype)

    x = x + formula(block.attention, norm(x))
    y, glu = norm(x), block.glu
    return x + glu.down_proj(glu.gate_proj(y) * glu.up_proj(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BLOCKS)
def test_prefill_in_one_in_chunks_and_by_token(dtype: torch.dtype, shape: str) -> None:
    block, x = block_of(dtype, **BLOCKS[shape]), inputs(130, dtype)
    exact = block_formula(block_of(dtype, **BLOCKS[shape]).double(), x.double())
    tolerance = relative_error(block_formula(block, x), exact) + TOLERANCE[dtype]
    for name, (out, state) in paths(block, x).items():  # type: ignore[arg-type]
        assert out.dtype == dtype
        assert relative_error(out, exact) <= tolerance, f"{name}: {relative_error(out, exact):.1e} > {tolerance:.1e}"
        assert state.num_tokens.tolist() == [130, 130]


def test_no_output_sees_the_future_or_another_sequence() -> None:
    block, x = block_of(use_lrpe=True), inputs(100)
    out, _ = block(x, num_segments=1)
    changed = x.clone()
    changed[:, 70:] = 100.0
    changed[1] = 100.0
    again, _ = block(changed, num_segments=1)
    assert_same_bits(again[0, :70], out[0, :70])
    assert (again[0, 70:] != out[0, 70:]).any()


def modules() -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {f"layer {name}": layer_of(**options) for name, options in LAYERS.items()}
    return layers | {"block": block_of(use_lrpe=True)}


@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("integers", [False, True])
def test_padding_is_as_if_it_were_not_there(name: str, integers: bool) -> None:
    """In one call, in pieces, and token by token, where a piece of a sequence may be nothing but padding."""
    module, x = modules()[name], inputs(70, batch=3)
    mask = MASK.long() if integers else MASK
    pieces, state = [], module.new_state(3)
    for begin, end in ((0, 51), (51, 64), (64, 70)):
        out, state = module(x[:, begin:end], state, attention_mask=mask[:, begin:end])
        pieces.append(out)
    tokens = module.new_state(3)
    steps = [module.decode(x[:, t : t + 2], tokens, attention_mask=mask[:, t : t + 2]) for t in range(0, 70, 2)]
    results = {
        "in one": module(x, attention_mask=mask),
        "in pieces": (torch.cat(pieces, dim=1), state),
        "by token": (torch.cat(steps, dim=1), tokens),
    }
    for row in range(3):
        alone, after = module(x[row : row + 1, MASK[row]])
        for how, (out, state) in results.items():
            assert relative_error(out[row, MASK[row]], alone[0]) < 1e-5, how
            assert relative_error(state.kv[row], after.kv[0]) < 1e-5, how
            assert state.num_tokens[row] == after.num_tokens[0]


@pytest.mark.parametrize("name", modules())
def test_what_stands_at_padding_does_not_matter(name: str) -> None:
    module, x = modules()[name], inputs(70, batch=3)
    other = torch.where(MASK[..., None], x, torch.inf)
    (out, state), (again, after) = (module(y, attention_mask=MASK) for y in (x, other))
    assert_same_bits(again[MASK], out[MASK])
    assert_same_bits((after.kv, after.num_tokens), (state.kv, state.num_tokens))


def test_a_mask_without_padding_changes_nothing() -> None:
    layer, x = layer_of(use_lrpe=True), inputs(70)
    out, state = layer(x, attention_mask=torch.ones(2, 70, dtype=torch.int64))
    expected, after = layer(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.kv, after.kv, rtol=0, atol=1e-5)


def test_memoryless_heads_pass_padding() -> None:
    """A decay of -inf forgets at every token, and at no padding."""
    layer = LightningAttention(HIDDEN, 4, torch.full((4,), -torch.inf)).requires_grad_(False)
    x, mask = inputs(5), torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]])
    _, state = layer(x, attention_mask=mask)
    for row, last in enumerate((3, 2)):
        _, after = layer(x[row : row + 1, last : last + 1])
        torch.testing.assert_close(state.kv[row], after.kv[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", ["forward", "decode"])
def test_bad_masks_leave_the_state_alone(call: str) -> None:
    block, x = block_of(), inputs(3)
    state: LightningState = block.new_state(2)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.zeros(2, 3)):
        rule = "`attention_mask` must be bool or integers of shape [batch, seqlen] = [2, 3]; got"
        with pytest.raises(ValueError, match=re.escape(rule)):
            getattr(block, call)(x, state, attention_mask=mask)
    assert not state.kv.any()
    assert not state.num_tokens.any()
